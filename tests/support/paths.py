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
