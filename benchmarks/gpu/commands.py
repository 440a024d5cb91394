"""Run a command for as long as a part has left, its output in a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TAIL = 2000  # characters of the output that a result keeps


def run(command: Sequence[str], log: Path, seconds: float, folder: Path | None = None) -> dict[str, Any]:
    """Run a command, its children ended with it.

    Args:
        command: What to run.
        log: Where its output goes.
        seconds: After which it is ended.
        folder: Where it runs.

    Returns:
        `exit_code` (None = ended), `seconds` and the end of its output.
    """
    begin = time.monotonic()
    with log.open("w") as file:
        started = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = started.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if started.poll() is None:  # out of time, or this process is told to end
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    return {"exit_code": code, "seconds": time.monotonic() - begin, "output_ends": tail}


def checked(done: dict[str, Any]) -> dict[str, Any]:
    """Return a command's result.

    Raises:
        RuntimeError: If it failed or was ended.
    """
    if done["exit_code"] != 0:
        what = "was ended: out of time" if done["exit_code"] is None else f"failed with exit code {done['exit_code']}"
        raise RuntimeError(f"The command {what}. Its output ends:\n{done['output_ends']}")
    return done
