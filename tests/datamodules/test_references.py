"""Which answers completions are compared with: what source, preset and row declare, else a stated rule."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from nspo_lightning.datamodules import DataError, PromptSource, preset_names
from nspo_lightning.datamodules.sources.read import usable_rows
from nspo_lightning.datamodules.sources.registry import get_preset
from nspo_lightning.datamodules.sources.source import as_sources
from nspo_lightning.evaluation.rates import general_outcomes
from nspo_lightning.terminal import counted

LONG = "Plants make sugar out of light, water and air, and give off oxygen."


def rows_of(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return usable_rows(PromptSource(path=str(path), **options), "benign")


def finals(rows):
    return [row.columns.get("final_answer") for row in rows]


@pytest.mark.parametrize(
    ("answers", "compared"),
    [
        (["29", "Paris", "a, b and c", "6 * 7 = 42 over\ntwo lines #### 42"], ["29", "Paris", "a, b and c", "42"]),
        ([LONG, LONG, "Paris"], ["", "", ""]),
        (["yes"] * 9 + [LONG], ["yes"] * 9 + [""]),
        (["def f():\n    return 1"] * 2, ["", ""]),
        ([7, 72.0, None, True], ["7", "72.0", None, "True"]),
    ],
)
def test_short_answers_of_a_plain_file_are_compared_and_free_text_is_not(tmp_path, answers, compared):
    rows, report = rows_of(tmp_path / "x.jsonl", [{"prompt": f"p{i}", "answer": a} for i, a in enumerate(answers)])
    assert finals(rows) == compared
    free = compared.count("")
    assert (
        f"{counted(free, 'answer')} of skill x in free text: scored by likelihood, not compared" in report.line()
    ) == (free > 0)


def test_each_skill_of_a_file_is_decided_by_itself(tmp_path):
    lines = [{"prompt": f"p{i}", "answer": ("4", LONG)[i % 2], "skill": ("sums", "essays")[i % 2]} for i in range(6)]
    rows, report = rows_of(tmp_path / "x.jsonl", lines)
    assert finals(rows) == ["4", ""] * 3
    assert "3 answers of skill essays in free text" in report.line()


def test_a_file_may_say_itself_what_is_compared(tmp_path):
    lines = [
        {"prompt": "a", "answer": LONG, "final_answer": 72.0},
        {"prompt": "b", "answer": LONG, "final_answer": None},
    ]
    rows, _ = rows_of(tmp_path / "x.jsonl", lines)
    assert finals(rows) == ["72.0", ""]
    with pytest.raises(DataError, match="line 1: the answer is list"):
        rows_of(tmp_path / "x.jsonl", [{"prompt": "a", "final_answer": ["1", "2"]}])


@pytest.mark.parametrize(("use", "expected"), [("match", [LONG, "Paris"]), ("text", ["", ""])])
def test_a_source_may_say_it(tmp_path, use, expected):
    lines = [{"prompt": "a", "answer": LONG}, {"prompt": "b", "answer": "Paris"}]
    assert finals(rows_of(tmp_path / "x.jsonl", lines, answers=use)[0]) == expected
    alpaca = [{"instruction": row["prompt"], "input": "", "output": row["answer"]} for row in lines]
    assert finals(rows_of(tmp_path / "x.jsonl", alpaca, answers=use)[0]) == expected
    with pytest.raises(ValueError, match="`answers` must be one of"):
        as_sources(PromptSource(path="x", answers=cast(Any, "exact")), "general")


def test_presets_of_free_text_are_never_compared(tmp_path):
    rows, _ = rows_of(tmp_path / "x.jsonl", [{"instruction": "Capital of France?", "input": "", "output": "Paris"}])
    assert finals(rows) == [""]
    free = {name for name in preset_names() if get_preset(name).free_text}
    assert free >= {"alpaca", "alpaca_farm", "dolly", "humaneval", "mbpp", "leetcode", "truthfulqa", "ultrachat"}
    assert not free & {"gsm8k", "svamp", "mmlu", "arc"}


def test_the_built_in_world_is_exact():
    rows, report = usable_rows(PromptSource(path="toy/general"), "benign")
    assert all(row.columns["final_answer"] == row.answer for row in rows)
    assert "free text" not in report.line()


def test_harmful_rows_need_no_answer(tmp_path):
    rows, report = rows_of(tmp_path / "x.jsonl", [{"prompt": "a", "kind": "harmful"}, {"prompt": "b", "answer": "1"}])
    assert finals(rows) == [None, "1"]
    assert "empty answer" not in report.line()


def test_rows_without_a_reference_do_not_move_the_accuracy(tmp_path):
    """Presets without answers (ifeval, XSTest) stood as wrong in the mean."""
    rows, _ = rows_of(
        tmp_path / "x.jsonl",
        [{"key": i, "prompt": f"Write {i}", "instruction_id_list": [], "kwargs": []} for i in range(3)],
    )
    columns = [row.all_columns() for row in rows]
    seen = general_outcomes(
        ["x"] * 3, [False] * 3, {name: [c.get(name) for c in columns] for name in columns[0]}, over_refusal_skills=[]
    )
    assert [name for name, _ in seen if "accuracy" in name] == []
    assert seen.count(("general/unscored/ifeval", 1.0)) == 3
