"""The tests marked `gpu`; on a CPU they are collected and not run."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import run
from device import Device
from record import ROOT, Record
from workload import Scale

PASSED, NOTHING = 0, 5  # pytest's exit codes


def measure(device: Device, record: Record) -> dict[str, Any]:
    """Run them.

    Raises:
        RuntimeError: If one fails.
        NotImplementedError: If there are none, or no pytest.
    """
    files = sorted(str(f) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text(encoding="utf-8"))
    if find_spec("pytest") is None:
        raise NotImplementedError("pytest is not installed")
    if not files:
        raise NotImplementedError("no test is marked gpu")
    # Options of the project's own may ask for plugins that a bare machine has not.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [*([] if device.is_cuda else ["--collect-only"]), *files]
    done = run(command, record.path.with_suffix(".output.txt"), record.left() - 2, ROOT)
    if done["exit_code"] not in {PASSED, NOTHING}:
        raise RuntimeError(f"pytest: exit code {done['exit_code']}. Its output ends:\n{done['output_ends']}")
    return done


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Run them."""
    record.attempt("tests", lambda: measure(device, record))
