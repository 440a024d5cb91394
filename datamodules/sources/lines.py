"""The lines of a UTF-8 text file, plain or gzipped, each with its number; what is no such text is an error."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nspo_lightning.datamodules.sources.data_error import DataError

MAX_LINE_BYTES = 64 * 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a file, with its end.

    Raises:
        DataError: If it is not UTF-8 text, or its compression is broken.
    """
    number = 0
    try:
        with _open(path) as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                number += 1
                yield number, _decode(path, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}, after line {number}",
            f"the gzip data is cut short or damaged ({error})",
            "Fetch the file again; `gzip -t` tells whether it is whole.",
        ) from error


def _decode(path: Path, number: int, line: bytes) -> str:
    if number == 1:
        if line.startswith(_UTF16_BOMS):
            raise DataError(f"{path}, line 1", "the text is UTF-16", "Save the file as UTF-8.")
        line = line.removeprefix(_UTF8_BOM)
    if len(line) >= MAX_LINE_BYTES:
        raise DataError(
            f"{path}, line {number}",
            f"the line is longer than {MAX_LINE_BYTES >> 20} MiB",
            "Check that this is a text file with one row a line.",
        )
    if b"\0" in line:
        raise DataError(
            f"{path}, line {number}",
            "binary data (a NUL byte) in a text file",
            "Check that `path` names a text file, and its suffix.",
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}",
            f"byte {line[error.start]:#04x} at column {error.start + 1} is not valid UTF-8",
            "Save the file as UTF-8, for example with `iconv -f latin1 -t utf-8`.",
        ) from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as probe:
        magic = probe.read(2)
    zipped = path.name.lower().endswith(".gz")
    if zipped != (magic == _GZIP_MAGIC):
        fact = "does not hold gzip data" if zipped else "holds gzip data"
        raise DataError(
            str(path),
            f"the file {fact}, against its name",
            f"{'Drop' if zipped else 'Add'} the suffix `.gz`, or fetch the file again.",
        )
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]
