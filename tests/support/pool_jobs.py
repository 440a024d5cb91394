"""Work for the pool of `compare`: takes long, and takes its time to save when it is told to stop."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

SAVES_S = 3.0
"""Longer than a worker waits until it ends because its parent is gone."""


def works(arguments: list[str]) -> None:
    """Say that it began, and work until SIGTERM comes; then save, as a fit does.

    Args:
        arguments: The folder for what it says.
    """
    folder = Path(arguments[0])

    def save(*_: object) -> None:
        time.sleep(SAVES_S)
        (folder / "saved").touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, save)
    folder.mkdir()
    time.sleep(600)


if __name__ == "__main__":
    from rich import get_console

    from nspo_lightning.compare.pool import Job, run_all

    root = Path(sys.argv[1])
    jobs = [Job(name=name, arguments=[str(root / name)], log=root / f"{name}.txt") for name in ("first", "second")]
    run_all(jobs, 1, get_console(), works)
