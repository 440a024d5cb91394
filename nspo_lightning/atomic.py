"""Files that are there whole or not at all, whenever somebody looks and whatever happens to the process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ending of a file that is being written: `.<name>.<process>.partial`, which no reader takes for one."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its place; when the block ends, flush it to the disk and rename it over the old one.

    Args:
        path: Where the file shall be; missing folders are made.

    Yields:
        Where to write.

    Raises:
        OSError: If it can't be written. The old file is untouched then, and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)  # without it the rename itself may be lost with the power
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        content: What to write; what JSON does not know is written as text.
        path: Where to.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can do that.

    Args:
        folder: Which.
    """
    if os.name == "nt":  # folders can't be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems can't; the rename has happened all the same
        pass
    finally:
        os.close(handle)
