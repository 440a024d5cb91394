"""Where things are, and what a subprocess of a test needs on its path."""

from __future__ import annotations

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


def python_path(*folders: Path) -> str:
    """Return PYTHONPATH for a subprocess: these folders, the shared test modules, and what this process was given."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), str(SUPPORT), *([given] if given else [])])


_OF_THIS_PROCESS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "MASTER_", "TORCHELASTIC", "PL_", "SLURM")


def job_environment(*folders: Path) -> dict[str, str]:
    """Return the environment of a job that may start ranks of its own, on one thread each.

    What ranks, a launcher or a test before (Lightning's seed) left in this process is not in it. Its modules are those
    of `python_path(*folders)`.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_OF_THIS_PROCESS)}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(*folders), "GLOO_SOCKET_IFNAME": "lo"}
