"""The folder of a run: `runs/<name>` is the latest, earlier ones are kept, and a run that never began leaves none."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

RUNS = "runs"
"""Folder of all runs, in the working folder."""
DEFAULT_NAME = "nspo"
_BEGINNINGS = ("config.yaml", "hparams.yaml", "events.out.tfevents.")
"""What a run writes before it has anything to keep."""


def run_folder(name: str | None) -> Path:
    """Return where the run of a name is kept."""
    return Path(RUNS) / (name or DEFAULT_NAME)


class RunFolder:
    """Remembers what was done for a run, to undo it if the run ends before it began."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._kept: Path | None = None
        self._present: frozenset[str] = frozenset()

    @rank_zero_only
    def begin(self, folder: Path, *, set_aside: bool) -> None:
        """Note the run's folder, and move an earlier run out of the way, unless this one goes on in it."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self._folder, self._kept, self._present = folder, None, frozenset()
        if not (folder.is_dir() and any(folder.iterdir())):
            return
        if not set_aside:
            self._present = frozenset(p.name for p in folder.iterdir())
            return
        number = 1
        while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(kept)
        self._kept = kept
        rank_zero_info(f"An earlier run stood in {folder}; it is now {kept}.")

    @rank_zero_only
    def withdraw(self) -> None:
        """Remove a run that has nothing to keep, and put the earlier one back in its place."""
        folder, kept, self._folder, self._kept = self._folder, self._kept, None, None
        if folder is None:
            return
        if folder.is_dir():
            new = [p for p in folder.iterdir() if p.name not in self._present]
            if not all(p.is_file() and p.name.startswith(_BEGINNINGS) for p in new):
                return
            for file in new:
                file.unlink()
            if self._present:
                return
            folder.rmdir()
        if kept is not None:
            kept.rename(folder)
        for parent in (folder.parent, *folder.parent.parents):  # folders that were made for it
            if not parent.is_dir() or any(parent.iterdir()) or parent == Path.cwd():
                return
            parent.rmdir()


RUN_FOLDER = RunFolder()
"""That of the run in this process."""
