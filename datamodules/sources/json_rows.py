"""Rows of JSON files, each with its place: lines of objects, a list, an object that holds one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from nspo_lightning.datamodules.sources.data_error import DataError, clip, listing
from nspo_lightning.datamodules.sources.lines import numbered_lines
from nspo_lightning.datamodules.sources.rows import RawRow

_PROMPTS = re.compile("(prompt|instruction|question|goal)s?", re.IGNORECASE)
"""Keys of lists of texts that are prompts; under any other name texts may be answers, columns or authors."""
_COLUMN = re.compile(rf"{_PROMPTS.pattern}|(answer|completion|response|output|text|label|id)s?", re.IGNORECASE)
_LIST_CURE = 'Write a list of objects, JSON lines, or one list of texts as {"prompts": ["...", "..."]}.'
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|(?P<digits>\d{4301,})', re.DOTALL)


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object a line; DataError with the line that is none."""
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


def read_json(path: Path, notes: list[str]) -> Iterator[RawRow]:
    """Yield the rows of a JSON document: a list, an object with one, or CatQA's nested one.

    Which texts were taken for prompts is added to `notes`.

    Raises:
        DataError: If it is none of them, with the line.
    """
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
    lists = {key: value for key, value in document.items() if isinstance(value, list) and value}
    tables = [key for key, value in lists.items() if isinstance(value[0], dict)]
    if len(tables) == 1:  # {"data": [{...}, ...]}
        for index, row in enumerate(lists[tables[0]]):
            where = f"{path}, {tables[0]}[{index}]"
            yield RawRow(where=where, data=_as_object(row, where))
        return
    key, texts = next(iter(lists.items()), ("", []))
    if len(lists) == 1 and isinstance(texts[0], str) and _PROMPTS.fullmatch(key):  # {"instructions": ["...", ...]}
        notes.append(f"the texts of `{key}` were read as prompts")
        for index, text in enumerate(texts):
            yield RawRow(where=f"{path}, {key}[{index}]", data={"prompt": text})
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
                _LIST_CURE,
            )
        if columns := [name for name in groups if _COLUMN.fullmatch(name)]:
            raise DataError(
                str(path),
                f"a JSON object whose key {category!r} holds columns ({listing(columns)}) is no list of rows",
                _LIST_CURE,
            )
        for subcategory, questions in groups.items():
            for index, question in enumerate(questions):
                where = f"{path}, {category} / {subcategory} [{index}]"
                yield RawRow(where=where, data={"Category": category, "Subcategory": subcategory, "Question": question})
