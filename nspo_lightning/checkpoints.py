"""Where a run's checkpoints are, and reading and writing them: whole or not at all, as data and never as code.

A checkpoint is written beside its place, under a name that no reader takes for one, flushed to the disk and renamed.
Lightning's own plugin writes to the system's temporary folder and moves the file, which copies it where that folder is
another file system, and a copy can stop half-way.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.atomic import remove_leftovers, replacing
from nspo_lightning.compat.lightning import CHECKPOINTS

FOLDER = CHECKPOINTS
"""Folder of a run's checkpoints."""
LAST_FILE = "last.ckpt"
ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder a PEFT adapter."""
STATE_KEY = "nspo_lightning"
"""Entry of a checkpoint that says which base it belongs to, and where training was."""
PREFIX = "policy."
"""Parameters of the policy are named so in a checkpoint's ``state_dict``."""
BEST, LAST, LAST_IF_ANY = "best", "last", "last-if-any"
"""What `--ckpt_path` says for a checkpoint of the run of that name; the third, of `fit`: the last one, or a new run."""
_WORDS = (BEST, LAST, LAST_IF_ANY, "hpc", "registry")  # the latter two are Lightning's
_BEST_CALLBACK = """  trainer:
    callbacks:
      - class_path: lightning.pytorch.callbacks.ModelCheckpoint
        init_args: {monitor: safety/unsafe_rate, mode: min}"""


class CheckpointError(OSError):
    """A checkpoint could not be found, written or read. The message says what, where, and how to mend it."""


def last_in(folder: Path) -> Path | None:
    """Return the newest last checkpoint of a folder, None without any.

    `ModelCheckpoint` numbers one whose name is taken (``last-v1.ckpt``), and Lightning's `fit` goes on from the newest.
    """
    return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def find_checkpoint(name: str, run: Path) -> Path:
    """Return the file or folder that `--ckpt_path` names.

    Args:
        name: ``best`` (see `best_of`), ``last`` (see `last_in`), a checkpoint file, or a folder with a PEFT adapter.
        run: The run's folder, for the first two.

    Raises:
        CheckpointError: If there is none.
    """
    if name not in {BEST, LAST}:
        path = Path(name).expanduser()
        if path.is_file() or (path / ADAPTER_CONFIG).is_file():
            return path
        what = f"a folder without {ADAPTER_CONFIG}" if path.is_dir() else "nothing"
        raise CheckpointError(
            f"`--ckpt_path {name}`: expected a checkpoint file, or a folder with a PEFT adapter, and found {what} "
            "there. Give a file from a run's `checkpoints/`, its `adapter/`, or `best` or `last`."
        )
    last = last_in(run / FOLDER)
    if last is None or not last.is_file():
        raise CheckpointError(
            f"`--ckpt_path {name}`: expected the run's {run / FOLDER / LAST_FILE}, and it is not there. Give the name "
            "of a run that was trained (`--name`), or a checkpoint file. Without the option `fit` begins anew, and "
            "other commands take the base."
        )
    found = last if name == LAST else best_of(read_checkpoint(last).get("callbacks", {}).values(), last.parent)
    if found is None:
        raise CheckpointError(
            f"`--ckpt_path best`: no `ModelCheckpoint` of {run} monitored a metric and kept a file, so none is the "
            f"best. Use `last`, or train with a callback that keeps the best:\n{_BEST_CALLBACK}"
        )
    return found


def best_of(states: Iterable[Any], folder: Path | None = None) -> Path | None:
    """Return the file that the last `ModelCheckpoint` with a monitor calls best, None if there is none.

    Args:
        states: The callbacks' states, as `ModelCheckpoint.state_dict` gives them; others are passed over.
        folder: Where the run keeps its checkpoints now, if it may have been moved since.
    """
    for state in reversed(list(states)):
        if not isinstance(state, Mapping) or not state.get("monitor") or not state.get("best_model_path"):
            continue
        path = Path(str(state["best_model_path"]))
        places = [path] if folder is None else [folder / path.name, path]
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            return found
    return None


def check_readable(name: str) -> None:
    """Look whether the checkpoint that `--ckpt_path` names can be read, before anything long.

    A word or an address is resolved later. A folder, as sharded strategies write it, is not looked into: PyTorch reads
    its index and its plain values with pickle, so it must come from a run of one's own.

    Raises:
        FileNotFoundError: If nothing is there.
        CheckpointError: If it can't be read, or holds more than data.
    """
    path = Path(name)
    if name in _WORDS or "://" in name:
        return
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if not path.is_dir():
        read_checkpoint(path, "meta")
    elif (path / ".metadata").exists():
        rank_zero_info(
            f"{path} is a sharded checkpoint. PyTorch reads those with pickle, which can run code: go on from your own "
            "runs only."
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints beside their place and renames them; other file systems are Lightning's to handle.

    The first time that it reads from or writes to a folder, it removes what killed runs left half written there.
    """

    def __init__(self) -> None:
        self._tidied: set[Path] = set()

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # As data alone, also if the caller asks for `weights_only=False`.
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        self._tidy(Path(path).parent)
        return read_checkpoint(path, map_location)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._tidy(Path(path).parent)
        # In memory first: `torch.save` hides a full disk behind an error about its own archive, and the size is known.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_checkpoint(content.getbuffer(), Path(path))

    def _tidy(self, folder: Path) -> None:
        if folder not in self._tidied:
            self._tidied.add(folder)
            remove_leftovers(folder)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint as data: tensors (nowhere, if `map_location` is meta) and plain values, never code."""
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a file that is no checkpoint makes `torch.load` raise a dozen types
        named = isinstance(error, OSError) and error.filename is not None  # not there, or not ours to read
        if named or isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(_unreadable(path, TypeError("no dictionary")))
    return content


def updates_in(checkpoint: Mapping[str, Any]) -> int:
    """Return how many updates were taken up to a checkpoint; earlier ones hold only the steps and what was skipped."""
    counters = checkpoint.get(STATE_KEY, {}).get("counters", {})
    skipped = counters.get("updates_skipped", 0) + counters.get("updates_nonfinite", 0)
    return int(counters.get("updates", checkpoint.get("global_step", 0) - skipped))


def write_checkpoint(content: bytes | memoryview, path: Path) -> None:
    """Write a checkpoint, whole or not at all; if it can't be written, the old file is untouched."""
    had_one = path.exists()
    try:
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise CheckpointError(_unwritable(error, len(content), path, had_one)) from error


def _unreadable(path: str | Path, error: Exception) -> str:
    planted = re.search(r"GLOBAL (\S+)", str(error))
    if planted:
        found = f"it holds code ({planted[1]}) besides tensors and plain values, and that is never run"
    else:
        found = "it is not a checkpoint that can be read without running code from it, or only a part of one"
    return f"The checkpoint {path} can't be read: {found}. Give one from a run's `checkpoints/`."


def _unwritable(error: OSError, size: int, path: Path, had_one: bool) -> str:
    free = "?"
    with contextlib.suppress(OSError):
        free = _megabytes(shutil.disk_usage(path.parent).free)
    whole = f"The checkpoint that stood there before is whole: {path}." if had_one else f"No {path.name} was begun."
    return (
        f"The checkpoint {path} could not be written ({error.strerror or error}): it takes {_megabytes(size)}, and "
        f"{free} are free in {path.parent}. {whole} Make room there (or look at quotas and permissions), then go on "
        "with the same command and `--ckpt_path last`."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
