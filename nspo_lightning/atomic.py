"""Files that are there whole or not at all, whenever somebody looks and whatever happens to the process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

PARTIAL = ".partial"
"""Ending of a file that is being written, `.<name>.<process>.partial`. No reader takes one for a finished file."""
SHARED_LEFTOVER_S = 3600.0
_HALVES = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its place; at the end of the block flush it to the disk and rename it over the old one.

    Yields:
        Where to write.

    Raises:
        OSError: If a device or a pipe is there, which would be gone (for root, /dev/null too).
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _ordinary_mode(partial)
        yield partial
        partial.chmod(mode)  # libraries make some private (safetensors does)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)  # without it the rename itself may be lost with the power
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """Return where this process writes a file until it is complete."""
    return _beside(path, PARTIAL)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside its place; at the end of the block move it there. If that fails, the old one stays."""
    path = path.absolute()
    partial, old = _beside(path, PARTIAL), _beside(path, ".old")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
    partial.mkdir()
    try:
        yield partial
        give_ordinary_permissions(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def give_ordinary_permissions(folder: Path, files: str = "**/*") -> None:
    """Let those read a folder's files (a glob) who may read any new file there: libraries make some private."""
    probe = partial_of(folder / "mode")
    mode = _ordinary_mode(probe)
    probe.unlink()
    for path in folder.glob(files):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | mode)


def _ordinary_mode(new: Path) -> int:
    """Return the permissions that this process gives a new file, by making it."""
    new.unlink(missing_ok=True)
    new.touch()
    return stat.S_IMODE(new.stat().st_mode)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file, whole or not at all; what JSON does not know is written as text."""
    with replacing(path) as partial:
        partial.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")


def set_aside(files: Sequence[Path], kind: str) -> Path | None:
    """Move files of one folder, those that are there, into a new one in it: `<kind>.1`, or the next free number.

    Returns:
        The new folder; None if none of them is there.
    """
    there, number = [file for file in files if file.exists()], 1
    if not there:
        return None
    while os.path.lexists(kept := there[0].with_name(f"{kind}.{number}")):
        number += 1
    kept.mkdir()
    for file in there:
        file.rename(kept / file.name)
    return kept


def set_aside_other(result: Path, identity: Mapping[str, Any], files: Sequence[Path] = ()) -> Path | None:
    """Move a result (JSON) and its files out of the way if it is about something else than what will be written.

    Args:
        result: Its `identity` says what it is about.
        identity: What the new one is about.
        files: What belongs to it, in the same folder.

    Returns:
        Where it is now; None if it may be replaced, or is not there.
    """
    try:
        there = json.loads(result.read_text(encoding="utf-8"))["identity"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # none of ours
        there = None
    if json_text(there) == json_text(json.loads(json_text(identity))):  # 1 batch is not 1.0 = all of them
        return None
    return set_aside([result, *files], result.stem)


def json_text(content: Any, indent: int | None = None) -> str:
    """Return JSON that any file takes: half a character is written as its code, what JSON does not know as text."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, default=str)
    return _HALVES.sub(lambda half: f"\\u{ord(half.group()):04x}", text)


def without_surrogates(value: T) -> T:
    """Return text, or lists and dictionaries of it, with U+FFFD in the place of lone surrogates (half characters).

    They come from codes in JSON. UTF-8 has no form for them, so no file, server or tokenizer takes them.
    """
    changed: Any = value
    if isinstance(value, str):
        if _HALVES.search(value):
            changed = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    elif isinstance(value, dict):
        changed = {without_surrogates(name): without_surrogates(inner) for name, inner in value.items()}
    elif type(value) in (list, tuple):
        changed = type(value)(without_surrogates(inner) for inner in value)  # type: ignore[call-arg,attr-defined]
    result: T = changed
    return result


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can do that."""
    if os.name == "nt":  # folders can't be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems can't; the rename has happened all the same
        pass
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, *, shared: bool = False) -> list[Path]:
    """Return the files that killed processes left half written in a folder, which may be missing, after removing them.

    If several machines write there (`shared`), a process of another machine can't be seen: only files that nobody wrote
    to for an hour are removed.
    """
    removed: list[Path] = []
    for file in sorted(folder.glob(f".*{PARTIAL}")) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if _is_being_written(file) or (shared and time.time() - file.stat().st_mtime < SHARED_LEFTOVER_S):
                continue
            file.unlink()
            removed.append(file)
    return removed


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{ending}")


def _is_being_written(file: Path) -> bool:
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
