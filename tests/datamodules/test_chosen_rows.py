"""`only` and `without`: rows chosen by the values of their columns, and no value that chooses nothing."""

from __future__ import annotations

import json

import pytest

from nspo_lightning.datamodules import DataError, PromptSource
from nspo_lightning.datamodules.sources.read import usable_rows
from nspo_lightning.datamodules.sources.source import as_sources

TYPES = ["homonyms", "definitions", "privacy", "homonyms", "privacy", 3]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Request {i}", "type": of, "id": i} for i, of in enumerate(TYPES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chosen(file, **fields):
    rows, report = usable_rows(PromptSource(path=file, **fields), "harmful")
    return [str(row.prompt).split()[1] for row in rows], report


def test_only_and_without_are_opposites(file):
    only, report = chosen(file, only={"type": ["homonyms", "3"]})
    assert only == ["0", "3", "5"]
    assert "6 rows read, 3 left out (3 not chosen by" in report.line()
    assert "names no row by itself" not in report.line(), "ids of rows that were not read are missing from nothing"
    assert chosen(file, without={"type": ["homonyms", 3]})[0] == ["1", "2", "4"]
    assert chosen(file, only={"type": "privacy"}, without={"id": 2})[0] == ["4"]


@pytest.mark.parametrize("field", ["only", "without"])
def test_a_value_that_no_row_has_is_refused(file, field):
    with pytest.raises(DataError) as caught:
        chosen(file, **{field: {"type": ["homonyms", "homonym"]}})
    said = str(caught.value)
    assert "no row has 'homonym' in the column 'type'" in said
    assert "'definitions'" in said


@pytest.mark.parametrize("field", ["only", "without"])
def test_white_space_is_no_other_value_and_another_case_is_refused(tmp_path, field):
    path = tmp_path / "odd.csv"
    path.write_text("prompt,type\nRequest 1,homonyms \nRequest 2, homonyms\nRequest 3,privacy\n")
    assert chosen(str(path), **{field: {"type": "homonyms"}})[0] == (["1", "2"] if field == "only" else ["3"])
    path.write_text(path.read_text() + "Request 4,Homonyms\n")
    with pytest.raises(DataError, match="also holds 'Homonyms', spelt otherwise"):
        chosen(str(path), **{field: {"type": "homonyms"}})


def test_a_column_that_a_row_lacks_is_refused(file):
    with pytest.raises(DataError, match="`only` asks for the column 'kind'; the row has 'prompt', 'type', 'id'"):
        chosen(file, only={"kind": "x"})


@pytest.mark.parametrize("bad", [{}, {"type": []}])
def test_nothing_named_is_refused(bad):
    with pytest.raises(ValueError, match="`without` must name columns and values"):
        as_sources([PromptSource(path="x.jsonl", without=bad)], "data.safety")
