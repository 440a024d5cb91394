"""The folder of a run: `runs/<name>` is the latest, earlier ones are kept, and a run that never began leaves none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from nspo_lightning.cli.run_lock import RunLock

RUNS = "runs"
"""Folder of all runs, in the working folder."""
CACHE = "nullspace"
"""Folder of all runs' calibrations, in `RUNS`: `NullSpaceProjection`'s own place for them."""
DEFAULT_NAME = "nspo"
LONGEST_NAME = 200
"""In bytes; a file system's limit is 255, and kept runs and locks have longer names."""
_MEANS_MORE = frozenset('/\\$%*?<>|"`')  # to a path, a shell, or to TensorBoardLogger, which expands variables
_BEGINNINGS = (
    *("config.", "hparams.yaml", "events.out.tfevents.", "metrics.csv", "completions.jsonl", "answers.jsonl"),
    *("nullspace.layers.csv", "null_space."),
)
"""What a run writes before it has anything to keep."""
_KEPT = ("checkpoints", "adapter", "summary.json")
"""What a run has to keep, with something in it."""
_OF_OTHERS = frozenset({"commands", "runs", "local.yaml"})
"""What `compare` and `make real` write into their folders, which hold runs and are none."""


def check_run_name(name: str) -> None:
    """Refuse what is no name of one folder in runs/; ValueError says why."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        problem = "it holds half a character (a lone surrogate)"
    else:
        if not name.strip():
            problem = "it is empty"
        elif name.startswith("."):
            problem = "it begins with a dot"
        elif name.casefold() == CACHE:
            problem = "that folder is for the calibrations of all runs"
        elif name != name.strip() or not name.isprintable():
            problem = "it begins or ends with a space, or holds characters that can't be seen"
        elif "::" in name or _MEANS_MORE & set(name):
            problem = f"it holds one of {' '.join(sorted(_MEANS_MORE))} ::"
        elif length > LONGEST_NAME:
            problem = f"it is longer than {LONGEST_NAME} bytes"
        else:
            return
    shown = ascii(name if len(name) < 60 else f"{name[:60]}...")
    raise ValueError(
        f"`--name` must name one folder in {RUNS}/, got {shown}: {problem}. Give a word such as {DEFAULT_NAME} or "
        "lr1e-5_seed0."
    )


def run_folder(name: str | None, runs: str | None = None) -> Path:
    """Return where the run of a name is kept, in the folder for all `runs`; ValueError if it is no name."""
    chosen = DEFAULT_NAME if name is None else name
    check_run_name(chosen)
    return Path(runs or RUNS) / chosen


def check_output(option: str, path: str | Path, inputs: Sequence[Path] = ()) -> Path:
    """Return the path of a file to be written, after a look whether it can be: what comes before it may be long.

    Raises:
        ValueError: If it can't be one, or is one of the files that are read.
    """
    target = Path(path)
    problem = ""
    if not target.name or not str(path) or "\0" in str(path):
        problem = "it is no file's name"
    elif target.is_dir():
        problem = "it is a folder"
    elif target.exists() and not target.is_file():
        problem = "it is no ordinary file"
    elif any(source.exists() and source.resolve() == target.resolve() for source in inputs):
        problem = "it would replace what is read"
    else:
        problem = _unwritable(target)
    if problem:
        raise ValueError(f"`{option}` must be a file to write, got {str(path)!a}: {problem}. Give another path.")
    return target


def _unwritable(target: Path) -> str:
    """Return why no file can be written there; "" if one can. Folders that are missing are left to the writer."""
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"nothing can be written in {folder} ({error.strerror or error})"


def own_folder(log_dir: str, save_dir: str) -> Path | None:
    """Return a logger's folder if it is its alone: below the folder for all runs, and not around where we stand."""
    inside = Path(os.path.relpath(log_dir, save_dir))
    around = Path.cwd().is_relative_to(Path(log_dir).resolve())
    return None if inside == Path() or inside.parts[0] == os.pardir or around else Path(log_dir)


class RunFolder:
    """Remembers what was done for a run, to undo it if the run ends before it began."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._kept: Path | None = None
        self._lock: RunLock | None = None
        self._present: frozenset[str] = frozenset()
        self._missing: list[Path] = []

    @rank_zero_only
    def begin(self, folder: Path, *, set_aside: bool, shared: bool = False) -> None:
        """Note the run's folder, lock it, and move an earlier run out of the way.

        Args:
            folder: The folder that the run writes to.
            set_aside: False for a run that goes on in it.
            shared: The folder is not the run's alone, so it is neither locked nor moved.

        Raises:
            RunLockedError: If another run is in it.
            ValueError: If what stands there is no run.
        """
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self.end()
        self._missing = [parent for parent in folder.absolute().parents if not parent.exists()]
        if not shared:
            lock = RunLock(folder)
            lock.take()
            self._lock = lock
        self._folder, self._kept, self._present = folder, None, frozenset()
        if not (folder.is_dir() and any(folder.iterdir())):
            return
        if shared or not set_aside:
            self._present = frozenset(p.name for p in folder.iterdir())
            return
        if found := sorted(_OF_OTHERS & {p.name for p in folder.iterdir()}):
            self.end()
            raise ValueError(
                f"`--name {folder.name}`: {folder} is there and is no run but holds others (`{found[0]}` is in it), so "
                "it is not moved out of the way. Give another `--name`, or move it yourself."
            )
        kept = _next_free(folder)
        folder.rename(kept)
        self._kept = kept
        rank_zero_info(f"An earlier run stood in {folder}; it is now {kept}.")

    def end(self) -> None:
        """Let go of the folder."""
        lock, self._lock, self._folder = self._lock, None, None
        if lock is not None:
            lock.release()

    @rank_zero_only
    def withdraw(self) -> None:
        """Remove a run that has nothing to keep, and put the earlier one back in its place."""
        folder, kept = self._folder, self._kept
        gone = folder is not None and self._removed(folder)
        if gone and folder is not None and kept is not None:
            kept.rename(folder)
        self.end()
        for parent in self._missing if gone else ():  # folders that were made for it
            if not parent.is_dir() or any(parent.iterdir()):
                return
            parent.rmdir()

    def _removed(self, folder: Path) -> bool:
        """Remove what a run wrote before it had anything to keep; whether its place is free now."""
        if not folder.is_dir():
            return True
        if not self._present and any(_has_content(folder / name) for name in _KEPT):
            return False
        for path in [p for p in folder.iterdir() if p.name not in self._present]:
            if path.is_file() and path.name.startswith(_BEGINNINGS):
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if self._present:
            return False
        if any(folder.iterdir()):  # of a callback of the user's
            if self._kept is None:
                return False
            rank_zero_info(f"What the run that failed has left is in {(rest := _next_free(folder))}.")
            folder.rename(rest)
        else:
            folder.rmdir()
        return True


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _next_free(folder: Path) -> Path:
    number = 1
    while os.path.lexists(kept := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    return kept


RUN_FOLDER = RunFolder()
"""That of the run in this process."""
