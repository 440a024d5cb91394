"""Checkpoints that are there whole or not at all, on a disk that may be full and in a process that may be killed.

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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.atomic import PARTIAL, replacing

SHARED_LEFTOVER_S = 3600.0


class CheckpointError(OSError):
    """A checkpoint could not be written or read. The message says what, where, and how to mend it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints beside their place and renames them; other file systems are Lightning's to handle.

    The first time that it reads from or writes to a folder, it removes what killed runs left half written there.
    """

    def __init__(self) -> None:
        self._tidied: set[Path] = set()

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Whatever Lightning's default is or a caller asks for: a checkpoint is data, and data runs no code.
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        self._tidy(Path(path).parent)
        return read_checkpoint(path, map_location)

    def _tidy(self, folder: Path) -> None:
        if folder not in self._tidied:
            self._tidied.add(folder)
            remove_leftovers(folder)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._tidy(Path(path).parent)
        # In memory first: `torch.save` hides a full disk behind an error about its own archive, and the size is known.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_checkpoint(content.getbuffer(), Path(path))


def read_checkpoint(path: _PATH, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint as data: tensors and plain values, never code.

    Args:
        path: The file.
        map_location: Where its tensors go; "meta" = nowhere.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If nothing is there.
        CheckpointError: If it can't be read, or holds more than data.
    """
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


def check_checkpoint(path: Path) -> None:
    """Look whether a checkpoint can be read, before anything long.

    Args:
        path: The file (or a folder, as sharded strategies write it, which is not looked into: PyTorch reads its index
            and its plain values with pickle, so it must come from a run of one's own).

    Raises:
        FileNotFoundError: If nothing is there.
        CheckpointError: If it can't be read, or holds more than data.
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_dir():
        read_checkpoint(path, "meta")
    elif (path / ".metadata").exists():
        rank_zero_info(
            f"{path} is a sharded checkpoint. PyTorch reads those with pickle, which can run code: go on from your own "
            "runs only."
        )


def _unreadable(path: _PATH, error: Exception) -> str:
    planted = re.search(r"GLOBAL (\S+)", str(error))
    if planted:
        found = f"it holds code ({planted[1]}) besides tensors and plain values, and that is never run"
    else:
        found = "it is not a checkpoint that can be read without running code from it, or only a part of one"
    return f"The checkpoint {path} can't be read: {found}. Give one from a run's `checkpoints/`."


def write_checkpoint(content: bytes | memoryview, path: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        content: What to write.
        path: Where to; missing folders are made.

    Raises:
        CheckpointError: If it can't be written, for lack of room or another reason. The old file is untouched then.
    """
    had_one = path.exists()
    try:
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise CheckpointError(_explanation(error, len(content), path, had_one)) from error


def remove_leftovers(folder: Path, *, shared: bool = False) -> list[Path]:
    """Remove what killed processes left half written.

    Args:
        folder: Where to look; it may be missing.
        shared: Whether several machines write here. A process of another machine can't be seen, so only files that
            nobody wrote to for an hour are removed.

    Returns:
        The files that were removed.
    """
    removed: list[Path] = []
    for file in _partial_files(folder):
        with contextlib.suppress(OSError):
            if _is_running(file) or (shared and time.time() - file.stat().st_mtime < SHARED_LEFTOVER_S):
                continue
            file.unlink()
            removed.append(file)
    return removed


def _partial_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(folder.glob(f".*{PARTIAL}"))


def _is_running(file: Path) -> bool:
    """Whether the process that writes this file is there: its number stands before the ending."""
    number = file.name.removesuffix(PARTIAL).rpartition(".")[2]
    if not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and another user's
        return True
    return True


def _explanation(error: OSError, size: int, path: Path, had_one: bool) -> str:
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
