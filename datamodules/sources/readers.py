"""Strict readers of csv, json, jsonl and parquet files, plain or gzipped.

A lenient reader turns a broken file into fewer or other rows, and nobody notices. These readers stop at the first
thing that is not as it should be and say in which line it stands. Every row knows where it came from.

The readers of `datasets` and pyarrow can't take their place: they name no line, neither of a fault nor of a row, guess
the types of csv columns and fill missing JSON columns with nulls. Parquet files have no lines: pyarrow reads them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nspo_lightning.datamodules.sources.cells import csv_value
from nspo_lightning.datamodules.sources.data_error import DataError, clip, listing
from nspo_lightning.datamodules.sources.json_rows import read_json, read_jsonl
from nspo_lightning.datamodules.sources.lines import MAX_LINE_BYTES, numbered_lines
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.terminal import counted

_WHOLE = re.compile("-?[0-9]+")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


def file_format(path: Path) -> str | None:
    """The format that a file's name declares (`csv`, `tsv`, `json`, `jsonl`, `parquet`); None for other files."""
    name = path.name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return "jsonl" if suffix == ".ndjson" else suffix[1:] if suffix is not None else None


def read_file(path: Path, header: Sequence[str] | None = None, notes: list[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows of a csv, tsv, json, jsonl or parquet file, gzipped or not.

    `header` has the column names of a csv file that has no header line; what a user should know is added to `notes`.

    Raises:
        DataError: If the file is not what its name says, with the line or row.
    """
    notes = [] if notes is None else notes
    kind = file_format(path)
    if kind is None:
        raise DataError(
            str(path),
            f"files that end in {path.suffix!r} are not read",
            f"Use one of {listing(list(SUFFIXES))}, or .gz of them.",
        )
    if path.stat().st_size == 0:
        raise DataError(str(path), "the file is empty (0 bytes)", "Fetch or write it again, or point `path` elsewhere.")
    match kind:
        case "parquet":
            yield from _read_parquet(path)
        case "jsonl":
            yield from read_jsonl(path)
        case "json":
            yield from read_json(path, notes)
        case _:
            yield from _read_csv(path, header, "\t" if kind == "tsv" else ",", notes)


def _read_csv(path: Path, header: Sequence[str] | None, delimiter: str, notes: list[str]) -> Iterator[RawRow]:
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in numbered_lines(path)), delimiter=delimiter, strict=True)
    names = list(header) if header is not None else None
    next_line = 1
    try:
        for fields in reader:
            where, next_line = f"{path}, line {next_line}", reader.line_num + 1  # a row may span several lines
            if not fields:
                continue
            if names is None:
                names = _checked_header(path, fields, delimiter)
                if not names[0]:
                    notes.append(
                        f"the first column of {path.name} has no name and was left out (an index, as pandas writes)"
                    )
                continue
            if len(fields) != len(names):
                raise DataError(
                    where,
                    f"{counted(len(fields), 'field')}, but {counted(len(names), 'column')} ({listing(names)})",
                    "Quote fields that hold the separator, or set the preset whose columns these are.",
                )
            if not names[0] and not _WHOLE.fullmatch(fields[0].strip()):
                raise DataError(
                    where,
                    f"the first column has no name, and {clip(repr(fields[0]), 40)} in it is no row number of an index",
                    "Name every column in the first line, or set the preset of a headerless file.",
                )
            row = dict(zip(names, map(csv_value, fields), strict=True))
            yield RawRow(where=where, data={name: value for name, value in row.items() if name})
    except csv.Error as error:
        raise DataError(
            f"{path}, line {next_line}",
            f"broken csv ({error})",
            "Quote fields that hold commas, quotes or line breaks, and double the quotes inside.",
        ) from error
    finally:
        csv.field_size_limit(previous_limit)


def _checked_header(path: Path, fields: list[str], delimiter: str) -> list[str]:
    names = [field.strip() for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    where = f"{path}, line 1"
    if twice:
        raise DataError(
            where, f"column names occur twice: {listing(twice)}", "Give every column its own name in the first line."
        )
    if not all(names[1:]) or names == [""]:
        raise DataError(
            where,
            "a column has no name",
            "Name every column in the first line, or set the preset of a headerless file.",
        )
    other = "\t" if delimiter == "," else ","
    if len(names) == 1 and any(mark in names[0] for mark in (";", other)):
        raise DataError(
            where,
            f"the only column is {names[0]!r}: the separator is not {delimiter!r}",
            "Save the file with commas (.csv) or tabs (.tsv).",
        )
    return names


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield RawRow(where=f"{path}, row {number}", data=row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            str(path), f"not a readable parquet file ({clip(str(error), 120)})", "Fetch the file again."
        ) from error
