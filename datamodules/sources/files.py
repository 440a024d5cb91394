"""From a path to the files that hold a split."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from nspo_lightning.datamodules.sources.data_error import DataError, listing
from nspo_lightning.datamodules.sources.readers import SUFFIXES, file_format

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
_LOCAL_PREFIXES = ("/", "./", "../", "~", ".\\")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def looks_local(path: str) -> bool:
    """Whether a path means a local file or folder: something is there, or the text cannot be a hub id."""
    expanded = Path(path).expanduser()
    return (
        expanded.exists()
        or path.startswith(_LOCAL_PREFIXES)
        or file_format(expanded) is not None
        or _HUB_ID.fullmatch(path) is None
    )


def find_files(path: str, split: str) -> list[Path]:
    """Return the data files of a split, in the order of their names.

    Args:
        path: A data file, or a folder of data files (searched at all depths).
        split: In a folder, files whose path names this split are chosen when any file names a split.

    Raises:
        DataError: If nothing is there, or a folder has no file of the split.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(path, "no such file or folder", _missing_cure(root))
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(path, "neither a file nor a folder", "Point `path` at a data file or a folder of data files.")
    inside = root.resolve()
    found = sorted(p for p in root.rglob("*") if p.is_file() and file_format(p) is not None and not _hidden(p, root))
    if not found:
        raise DataError(
            path, "the folder holds no data file", f"Put files there that end in one of {listing(list(SUFFIXES))}."
        )
    for file in found:
        check_inside(file, inside)
    return _of_split(path, root, found, split)


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a file that leads out of a (resolved) data folder, through a link or through `..`."""
    if not file.resolve().is_relative_to(folder):
        raise DataError(
            str(file),
            f"it leads to {file.resolve()}, outside the folder",
            "Name that file as a source of its own, or copy it.",
        )


def _of_split(path: str, root: Path, found: list[Path], split: str) -> list[Path]:
    named = {file: split_of(file.relative_to(root)) for file in found}
    known = {name for name in named.values() if name is not None}
    if not known:
        return found  # files without split names are all one split
    wanted = [file for file, name in named.items() if name == canonical_split(split)]
    for word in (split.lower(), *_SPLIT_WORDS.get(canonical_split(split), ())):  # MMLU has both `val` and `dev`
        exact = [file for file in wanted if word in _words(file.relative_to(root))]
        if exact:
            return exact
    if not wanted:
        raise DataError(
            path,
            f"no file of the split {split!r}; the folder's files name {listing(sorted(known))}",
            "Set `split` to one of these, or point `path` at one file.",
        )
    return wanted


def canonical_split(split: str) -> str:
    """Give a split its usual name (`train`, `validation`, `test`); other names are left as they are."""
    return next((name for name, words in _SPLIT_WORDS.items() if split.lower() in words), split)


def split_of(relative: Path) -> str | None:
    """Read the split from the words of a file's path below its folder; None when no or several splits are named."""
    words = _words(relative)
    named = [name for name, split_words in _SPLIT_WORDS.items() if any(word in split_words for word in words)]
    return named[0] if len(named) == 1 else None


def _words(relative: Path) -> set[str]:
    return {word for part in relative.parts for word in re.split(r"[^A-Za-z]+", part.lower())}


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(root).parts)


def _missing_cure(root: Path) -> str:
    names = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, names, n=3)
    if close:
        return f"Did you mean {listing(close)} in {root.parent}?"
    if not root.parent.is_dir():
        return f"The folder {root.parent} is not there either: check the path, or give a hub id such as `openai/gsm8k`."
    return "Check the path, or give a hub id such as `openai/gsm8k`."
