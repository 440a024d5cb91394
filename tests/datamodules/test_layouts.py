"""Layouts of rows that people's files have: TRL's, verl's, OpenAI's, pandas' and plain lists."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nspo_lightning.datamodules import DataError, PromptSource, SafetyDataModule
from nspo_lightning.datamodules.sources.read import usable_rows

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 * 12?"}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
TOOL = {"role": "tool", "content": "4"}


def part(text, kind="text"):
    return {"type": kind, "text": text}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path, **options):
    return usable_rows(PromptSource(path=str(path), **options), "benign")


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": ASK,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 0, "split": "train"},
}
LAYOUTS: list[tuple[str, dict[str, Any], Any, str]] = [
    ("TRL prompt only", {"prompt": ASK}, ASK, ""),
    ("TRL prompt and completion", {"prompt": ASK, "completion": [assistant("72")]}, ASK, "72"),
    ("TRL plain", {"prompt": "6 * 12?", "completion": "72"}, "6 * 12?", "72"),
    ("TRL preference", {"prompt": ASK, "chosen": [assistant("72")], "rejected": [assistant("7")]}, ASK, ""),
    ("verl", VERL, ASK, "72"),
    ("an answer of one's own counts first", {"prompt": ASK, "answer": "6", "completion": "7"}, ASK, "6"),
    ("a prompt that holds its answer", {"prompt": [*ASK, assistant("72")]}, ASK, "72"),
    ("parts", {"messages": [user([part("Say "), part("a.")])]}, [user("Say a.")], ""),
    (
        "OpenAI's parts",
        {"messages": [user([part("a", "input_text")]), assistant([part("b", "output_text")])]},
        [user("a")],
        "b",
    ),
    ("developer", {"messages": [{"role": "developer", "content": "Be brief."}, user("a")]}, [ASK[0], user("a")], ""),
    (
        "null tool calls",
        {"messages": [user("a"), assistant("b", tool_calls=None), user("c")]},
        [user("a"), assistant("b"), user("c")],
        "",
    ),
    (
        "words beside a tool call",
        {"messages": [user("a"), assistant("I look.", tool_calls=[CALL]), TOOL, user("c")]},
        [user("a"), assistant("I look."), TOOL, user("c")],
        "",
    ),
    (
        "roles as others write them",
        {"messages": [{"role": "USER", "content": "a"}, {"role": "Model", "content": "b"}]},
        [user("a")],
        "b",
    ),
    (
        "OpenAI's functions",
        {"messages": [user("a"), assistant("I look."), {"role": "function", "content": "4"}, user("c")]},
        [user("a"), assistant("I look."), TOOL, user("c")],
        "",
    ),
    ("a thought as the answer", {"messages": [user("a"), assistant(None, reasoning_content="Hm.")]}, [user("a")], ""),
    ("a tool call as the answer", {"messages": [user("a"), assistant(None, tool_calls=[CALL])]}, [user("a")], ""),
]


@pytest.mark.parametrize(("name", "row", "prompt", "answer"), LAYOUTS, ids=[case[0] for case in LAYOUTS])
def test_a_row_is_read(tmp_path, tokenizer, name, row, prompt, answer):
    (tmp_path / "x.json").write_text(json.dumps([row]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    for file in (write(tmp_path / "x.jsonl", [row]), tmp_path / "x.json", tmp_path / "x.parquet"):
        (read,), _ = rows_of(file)
        assert (read.prompt, read.answer) == (prompt, answer), file.name
    data = SafetyDataModule(str(tmp_path / "x.jsonl"), tokenizer=tokenizer, val_size=0, test_size=0)
    batch = next(iter(data.train_dataloader()))
    text = tokenizer.decode(batch["prompt_ids"][0][batch["prompt_mask"][0]])
    turns = [user(prompt)] if isinstance(prompt, str) else prompt
    assert text == "".join(f"<|{t['role']}|>{t['content']}<|end|>" for t in turns) + "<|assistant|>"


def test_verls_ground_truth_is_what_is_compared_and_goes_to_the_rewards(tmp_path):
    (row,), _ = rows_of(write(tmp_path / "x.jsonl", [VERL]))
    assert row.columns["final_answer"] == "72"
    assert row.columns["reward_model"]["ground_truth"] == "72"
    assert row.columns["data_source"] == "openai/gsm8k"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [user([part("See"), IMAGE])]}, "message 1 holds a part 'image_url'"),
        ({"prompt": [user([{"type": "image"}, part("What is it?")])]}, "message 1 holds a part 'image'"),
        (
            {"messages": [user("a"), assistant(None, tool_calls=[CALL]), TOOL, user("b")]},
            "message 2 calls tools without a word",
        ),
        (
            {"messages": [user("a"), assistant("", tool_calls=[CALL]), user("b")]},
            "message 2 calls tools without a word",
        ),
        ({"messages": [user("a"), assistant(None)]}, "role 'assistant' and null"),
        (
            {"messages": [user("a"), assistant(None, reasoning_content="Hm."), user("b")]},
            "message 2 thinks without a word",
        ),
        (
            {"messages": [user("a"), assistant("I look.", tool_calls=[CALL]), TOOL, assistant("4")]},
            "before the answer stands message 3 of role 'tool'",
        ),
        ({"messages": [user("a"), TOOL]}, "the last message, 2, is of role 'tool'"),
        ({"messages": [user([])]}, "the prompt is empty"),
        ({"prompt": [assistant("a")]}, "do not end with a user turn"),
        ({"prompt": []}, "the messages are empty"),
    ],
)
def test_what_a_policy_of_text_cannot_use_is_named_with_its_row(tmp_path, row, found):
    file = write(tmp_path / "x.jsonl", [{name: [user("fine")] for name in row}, row])
    with pytest.raises(DataError) as caught:
        rows_of(file)
    assert "line 2" in str(caught.value)
    assert found in str(caught.value)
    assert "bad_rows: drop" in str(caught.value)
    rows, report = rows_of(file, bad_rows="drop")
    assert ([r.prompt for r in rows], report.dropped.total()) == ([[user("fine")]], 1)


def test_a_later_row_may_be_a_chat_or_a_text(tmp_path):
    rows, _ = rows_of(write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": [user("b")]}, {"prompt": "c"}]))
    assert [row.prompt for row in rows] == ["a", [user("b")], "c"]


def test_a_list_of_instructions(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "instructions": ["Do bad things", "Do worse"]}))
    rows, report = rows_of(tmp_path / "x.json")
    assert [(row.prompt, row.where.rsplit(", ", 1)[1]) for row in rows] == [
        ("Do bad things", "instructions[0]"),
        ("Do worse", "instructions[1]"),
    ]
    assert "the texts of `instructions` were read as prompts" in report.line()
    (tmp_path / "x.json").write_text(json.dumps({"instructions": ["Do bad things", None]}))
    with pytest.raises(DataError, match=r"instructions\[1\]: the prompt is null"):
        rows_of(tmp_path / "x.json")


@pytest.mark.parametrize(
    "document",
    [
        {"columns": ["prompt", "answer"], "index": [0], "data": [["How?", "So."]]},  # pandas' orient="split"
        {"name": "my set", "authors": ["Ann", "Bob"], "rows": {"0": {"prompt": "How?"}}},
        {"answer": ["So.", "Because."]},
        {"prompts": ["How?", "Why?"], "answers": ["So.", "Because."]},  # would lose the answers
        {"prompt": ["How?", "Why?"], "id": [1, 2]},
        {"train": {"prompt": ["How?"], "answer": ["So."]}},
    ],
    ids=["split", "authors", "answers", "two lists", "ids", "by split"],
)
def test_a_list_of_texts_that_are_not_known_to_be_prompts_is_refused(tmp_path, document):
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r'(?s)is no list of rows.*\{"prompts": \["\.\.\.", "\.\.\."\]\}'):
        rows_of(tmp_path / "x.json")


@pytest.mark.parametrize(("name", "mark"), [("x.csv", ","), ("x.tsv", "\t")])
def test_the_index_that_pandas_writes_is_left_out_and_said(tmp_path, name, mark):
    table = [["", "prompt", "answer"], ["0", "a", "1"], ["1", "b", "2"]]
    (tmp_path / name).write_text("".join(mark.join(line) + "\n" for line in table))
    rows, report = rows_of(tmp_path / name)
    assert [(row.prompt, row.answer, row.columns) for row in rows] == [
        ("a", "1", {"final_answer": "1"}),
        ("b", "2", {"final_answer": "2"}),
    ]
    assert f"the first column of {name} has no name and was left out" in report.line()


def test_ids_that_repeat_or_are_missing_are_said_and_nothing_is_lost(tmp_path):
    ids: list[Any] = [7, 7, None, "x", 8, 7]
    rows, report = rows_of(write(tmp_path / "x.jsonl", [{"prompt": f"p{i}", "id": x} for i, x in enumerate(ids)]))
    assert [row.prompt for row in rows] == [f"p{i}" for i in range(6)]
    assert "`id` names no row by itself (1 value repeats, 1 is missing)" in report.line()
    (tmp_path / "y.csv").write_text("id,prompt\n1,a\n2,b\n")
    assert "`id`" not in rows_of(tmp_path / "y.csv")[1].line()
    (tmp_path / "blank.csv").write_text("id,prompt\n1,a\n,b\n ,c\n,d\n")
    assert "`id` names no row by itself (0 values repeat, 3 are missing)" in rows_of(tmp_path / "blank.csv")[1].line()
    preset = [
        {"ID": "1", "Body": f"{i} cows.", "Question": "How many?", "Equation": "", "Answer": i, "Type": ""}
        for i in range(2)
    ]
    rows, report = rows_of(write(tmp_path / "z.jsonl", preset))
    assert len(rows) == 2
    assert "`ID` names no row" in report.line()


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (",answer\nHow do I?,So\nWhy?,Because\n", 2),
        (",prompt\n0,How?\nan answer,Why?\n", 3),
        (",prompt\n0.5,How?\n", 2),
        (",prompt\n,How?\n", 2),
    ],
)
def test_a_first_column_without_a_name_that_is_no_index_is_not_left_out(tmp_path, table, line):
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(DataError, match=rf"x\.csv, line {line}: .*no name.*\n?.*Name every column"):
        rows_of(tmp_path / "x.csv")
