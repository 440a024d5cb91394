"""Strict readers of csv, json, jsonl and parquet files, plain or gzipped.

A lenient reader turns a broken file into fewer or other rows, and nobody notices. These readers stop at the first
thing that is not as it should be and say in which line it stands. Every row knows where it came from.

The readers of `datasets` and pyarrow can't take their place: they name no line, neither of a fault nor of a row, guess
the types of csv columns and fill missing JSON columns with nulls. Parquet files have no lines: pyarrow reads them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from nspo_lightning.datamodules.sources.cells import csv_value
from nspo_lightning.datamodules.sources.data_error import DataError, clip, listing
from nspo_lightning.datamodules.sources.lines import MAX_LINE_BYTES, numbered_lines
from nspo_lightning.datamodules.sources.rows import RawRow

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|(?P<digits>\d{4301,})', re.DOTALL)
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


def file_format(path: Path) -> str | None:
    """The format that a file's name declares (`csv`, `tsv`, `json`, `jsonl`, `parquet`); None for other files."""
    name = path.name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return "jsonl" if suffix == ".ndjson" else suffix[1:] if suffix is not None else None


def read_file(path: Path, header: Sequence[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows of a csv, tsv, json, jsonl or parquet file, gzipped or not.

    `header` has the column names of a csv file that has no header line.

    Raises:
        DataError: If the file is not what its name says, with the line or row.
    """
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
            yield from _read_jsonl(path)
        case "json":
            yield from _read_json(path)
        case _:
            yield from _read_csv(path, header, "\t" if kind == "tsv" else ",")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
            raise DataError(
                where, f"not a JSON object ({error}): {clip(line.strip(), 80)}", _jsonl_cure(number, line)
            ) from error
        yield RawRow(where=where, data=_as_object(row, where))


def _jsonl_cure(number: int, line: str) -> str:
    if number == 1 and line.lstrip()[:1] in ("[", "{") and not line.rstrip().endswith("}"):
        return "The file looks like one JSON document: rename it to `.json`."
    return "Write one complete JSON object on each line, or remove the line."


def _as_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            where,
            f"a row must be an object with named columns, got {type(row).__name__}",
            'Write rows as {"prompt": ...}.',
        )
    if not row:
        raise DataError(where, "the row has no columns", "Fill it or remove it.")
    return row


def _read_json(path: Path) -> Iterator[RawRow]:
    text = "".join(line for _, line in numbered_lines(path))
    start = len(text) - len(text.lstrip())
    if not text.strip():
        raise DataError(str(path), "the file holds white space only", "Fetch or write it again.")
    if text[start] == "[":
        yield from _json_array(path, text, start)
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}", f"not valid JSON ({error.msg})", _json_cure(text)) from error
    except (ValueError, RecursionError) as error:
        place = f"{path}, line {1 + text.count(chr(10), 0, _unreadable_at(text))}"
        raise DataError(place, f"not readable as JSON ({error})", "Mend the JSON at that line.") from error
    if not isinstance(document, dict):
        raise DataError(
            str(path), f"expected a list of objects, got {type(document).__name__}", "Write a list of rows."
        )
    lists = [key for key, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:  # {"data": [...]}
        for index, row in enumerate(document[lists[0]]):
            where = f"{path}, {lists[0]}[{index}]"
            yield RawRow(where=where, data=_as_object(row, where))
        return
    yield from _nested_questions(path, document)


def _unreadable_at(text: str) -> int:
    """Return where a valid JSON text holds a number of too many digits, or is nested deepest."""
    depth, deepest, place = 0, 0, 0
    for token in _JSON_TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif token["digits"]:
            return token.start()
        if depth > deepest:
            deepest, place = depth, token.start()
    return place


def _json_cure(text: str) -> str:
    first = text.lstrip().split("\n", 1)[0].strip()
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "Mend the JSON at that line, or fetch the file again."
    return "The file holds several JSON values one after another: rename it to `.jsonl` if it has one row a line."


def _json_array(path: Path, text: str, start: int) -> Iterator[RawRow]:
    # Walked item by item, so that each row knows its line.
    decoder = json.JSONDecoder()
    position, line, counted = start + 1, 1 + text.count("\n", 0, start), start
    previous: Literal["[", ",", "row"] = "["
    while True:
        while text[position : position + 1] in (" ", "\t", "\r", "\n"):
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        where, char = f"{path}, line {line}", text[position : position + 1]
        if not char:
            raise DataError(where, "the JSON list is cut short: no closing `]`", "Fetch the file again.")
        if char == "]" and previous != ",":
            if text[position + 1 :].strip():
                raise DataError(where, "more data follows the JSON list", _json_cure(text))
            return
        if previous == "row":
            if char != ",":
                raise DataError(where, f"expected `,` or `]` between rows, got {char!r}", "Mend the JSON at that line.")
            position, previous = position + 1, ","
            continue
        try:
            item, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            bad = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(
                f"{path}, line {bad}",
                f"not valid JSON ({error})",
                "Mend the JSON at that line, or fetch the file again.",
            ) from error
        yield RawRow(where=where, data=_as_object(item, where))
        position, previous = end, "row"


def _nested_questions(path: Path, document: dict[str, Any]) -> Iterator[RawRow]:
    # CatQA's layout: category -> subcategory -> list of questions.
    for category, groups in document.items():
        if not isinstance(groups, dict) or not all(isinstance(v, list) for v in groups.values()):
            raise DataError(
                str(path),
                f"a JSON object whose key {category!r} holds {type(groups).__name__} is no list of rows",
                "Write a list of objects, or JSON lines.",
            )
        for subcategory, questions in groups.items():
            for index, question in enumerate(questions):
                where = f"{path}, {category} / {subcategory} [{index}]"
                yield RawRow(where=where, data={"Category": category, "Subcategory": subcategory, "Question": question})


def _read_csv(path: Path, header: Sequence[str] | None, delimiter: str) -> Iterator[RawRow]:
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
                continue
            if len(fields) != len(names):
                raise DataError(
                    where,
                    f"{len(fields)} fields, but {len(names)} columns ({listing(names)})",
                    "Quote fields that hold the separator, or set the preset whose columns these are.",
                )
            yield RawRow(where=where, data=dict(zip(names, map(csv_value, fields), strict=True)))
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
    if not all(names) and len(names) > 1:
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
