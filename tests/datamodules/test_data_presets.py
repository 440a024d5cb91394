"""Every preset against rows that are true to its public schema."""

from __future__ import annotations

import csv
import gzip
import json
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nspo_lightning.datamodules import DataError, Preset, PromptSource, preset_names, register
from nspo_lightning.datamodules.sources import registry
from nspo_lightning.datamodules.sources.read import usable_rows
from nspo_lightning.datamodules.sources.registry import get_preset

HARMS = ["Violence", "Drugs", "White-Collar Crime"]
PKU_7 = {
    "prompt": "How do I pick a lock?",
    "response_0": "I cannot help.",
    "response_1": "Like this.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
PKU_16 = {
    "prompt": PKU_7["prompt"],
    "response_0": "I cannot help.",
    "response_1": "Like this.",
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "Alpaca-7B",
    "response_1_source": "Alpaca-7B",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_harm_category": dict.fromkeys(HARMS, False),
    "response_1_harm_category": dict.fromkeys(HARMS, True),
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "better_response_id": 1,
    "safer_response_id": 0,
    "response_0_sha256": "a" * 64,
    "response_1_sha256": "b" * 64,
}
BEAVER_CATEGORY = {"animal_abuse": False, "drug_abuse,weapons,banned_substance": True}
HH = "\n\nHuman: How do I rob a shop?\n\nAssistant: Why?\n\nHuman: I am broke.\n\nAssistant: "
LEET = {
    "task_id": "two-sum",
    "prompt": "from typing import *",
    "completion": "class Solution: ...",
    "entry_point": "Solution().twoSum",
    "test": "def check(candidate): ...",
    "query": "You are an expert Python programmer. Solve: two sum.",
    "response": "Use a dictionary.",
    "input_output": [{"input": "nums = [1]", "output": "0"}],
    "meta": {"difficulty": "Easy"},
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """One."""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(f): ...",
}

# preset, row, recognised by its columns?, kind, prompt, answer
CASES = [
    ("pku_saferlhf", PKU_16, True, "harmful", "How do I pick a lock?", ""),
    ("pku_saferlhf", PKU_7, True, "harmful", "How do I pick a lock?", ""),
    (
        "beavertails",
        {"prompt": "Bad?", "response": "Yes", "category": BEAVER_CATEGORY, "is_safe": False},
        True,
        "harmful",
        "Bad?",
        "",
    ),
    (
        "beavertails_evaluation",
        {"prompt": "Bad?", "category": "animal_abuse", "category_id": 0},
        True,
        "harmful",
        "Bad?",
        "",
    ),
    ("advbench", {"goal": "Do bad", "target": "Sure, bad"}, True, "harmful", "Do bad", ""),
    ("advbench", {"prompt": "Do bad", "target": "Sure, bad"}, False, "harmful", "Do bad", ""),
    (
        "harmbench",
        {
            "Behavior": "Do bad",
            "FunctionalCategory": "contextual",
            "SemanticCategory": "chemical",
            "Tags": "context",
            "ContextString": "A text.",
            "BehaviorID": "do_bad",
        },
        True,
        "harmful",
        "A text.\n\n---\n\nDo bad",
        "",
    ),
    (
        "harmbench",
        {
            "Behavior": "Do bad",
            "FunctionalCategory": "standard",
            "SemanticCategory": "illegal",
            "Tags": "",
            "ContextString": "",
            "BehaviorID": "do_bad",
        },
        True,
        "harmful",
        "Do bad",
        "",
    ),
    ("harmbench", {"prompt": "Do bad", "category": "illegal"}, False, "harmful", "Do bad", ""),
    (
        "jailbreakbench",
        {"Index": 0, "Goal": "Do bad", "Target": "Sure", "Behavior": "Bad", "Category": "Fraud", "Source": "Original"},
        True,
        "harmful",
        "Do bad",
        "",
    ),
    (
        "strongreject",
        {"category": "Violence", "source": "custom", "forbidden_prompt": "Do bad"},
        True,
        "harmful",
        "Do bad",
        "",
    ),
    (
        "strongreject",
        {"prompt": "Do bad", "category": "Violence", "source": "custom"},
        False,
        "harmful",
        "Do bad",
        "",
    ),
    (
        "sorry_bench",
        {"question_id": 1, "category": "1", "turns": ["Do bad"], "prompt_style": "base"},
        True,
        "harmful",
        "Do bad",
        "",
    ),
    (
        "harmfulqa",
        {
            "topic": "Maths",
            "subtopic": "Sets",
            "id": 5,
            "question": "Bad?",
            "blue_conversations": {},
            "red_conversations": {},
        },
        True,
        "harmful",
        "Bad?",
        "",
    ),
    ("catqa", {"Category": "Fraud", "Subcategory": "Tax", "Question": "Bad?"}, True, "harmful", "Bad?", ""),
    (
        "alert",
        {"id": 0, "prompt": "### Instruction:\nDo bad\n### Response:\n", "category": "hate_other"},
        True,
        "harmful",
        "Do bad",
        "",
    ),
    (
        "alert",
        {"id": 0, "prompt": "Please do bad", "category": "hate_other", "attack_type": "suffix"},
        True,
        "harmful",
        "Please do bad",
        "",
    ),
    (
        "do_not_answer",
        {"id": 0, "risk_area": "A, B", "types_of_harm": "C", "specific_harms": "D", "question": "Bad?"},
        True,
        "harmful",
        "Bad?",
        "",
    ),
    (
        "simple_safety_tests",
        {"id": "sst_001", "harm_area": "A", "counter": 1, "category": "advice", "prompts_final": "Bad?"},
        True,
        "harmful",
        "Bad?",
        "",
    ),
    (
        "hh_rlhf",
        {"chosen": HH + "Ask for help.", "rejected": HH + "Here is how."},
        True,
        "harmful",
        [
            {"role": "user", "content": "How do I rob a shop?"},
            {"role": "assistant", "content": "Why?"},
            {"role": "user", "content": "I am broke."},
        ],
        "",
    ),
    (
        "xstest",
        {"id": 1, "prompt": "Kill a process?", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
        True,
        "benign",
        "Kill a process?",
        "",
    ),
    (
        "xstest",
        {"id": 2, "prompt": "Kill a man?", "type": "contrast", "label": "unsafe", "focus": "kill", "note": ""},
        True,
        "harmful",
        "Kill a man?",
        "",
    ),
    ("or_bench", {"prompt": "Kill a weed?", "category": "violence"}, False, "benign", "Kill a weed?", ""),
    (
        "coconot_contrast",
        {"id": "1", "category": "Safety", "subcategory": "dual use", "prompt": "Kill a weed?", "response": "Pull it."},
        False,
        "benign",
        "Kill a weed?",
        "Pull it.",
    ),
    (
        "alpaca",
        {"instruction": "Sort", "input": "b, a", "output": "a, b"},
        True,
        "benign",
        "Sort\n\nb, a",
        "a, b",
    ),
    (
        "alpaca_farm",
        {
            "instruction": "Name a star",
            "input": "",
            "output": "Sirius",
            "generator": "a model",
            "dataset": "helpful_base",
            "datasplit": "eval",
        },
        True,
        "benign",
        "Name a star",
        "Sirius",
    ),
    (
        "dolly",
        {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "closed_qa"},
        True,
        "benign",
        "It was Ann.\n\nWho?",
        "Ann",
    ),
    (
        "gsm8k",
        {"question": "1000 + 1?", "answer": "1000+1=<<1000+1=1001>>1001\n#### 1,001"},
        True,
        "benign",
        "1000 + 1?",
        "1000+1=<<1000+1=1001>>1001\n#### 1,001",
    ),
    (
        "svamp",
        {
            "ID": "chal-1",
            "Body": "Ann has 2 pens",
            "Question": "How many pens?",
            "Equation": "2",
            "Answer": 2.0,
            "Type": "Addition",
        },
        True,
        "benign",
        "Ann has 2 pens. How many pens?",
        "2",
    ),
    (
        "mmlu",
        {"question": "2+2?", "subject": "maths", "choices": ["3", "4", "5", "6"], "answer": 1},
        True,
        "benign",
        "2+2?\n\nA. 3\nB. 4\nC. 5\nD. 6\n\nAnswer with the letter of the right option.",
        "B",
    ),
    (
        "arc",
        {
            "id": "q1",
            "question": "2+2?",
            "choices": {"text": ["3", "4", "5"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        True,
        "benign",
        "2+2?\n\n1. 3\n2. 4\n3. 5\n\nAnswer with the letter of the right option.",
        "2",
    ),
    (
        "humaneval",
        HUMANEVAL,
        True,
        "benign",
        'Complete this Python function. Answer with the whole function.\n\ndef one():\n    """One."""\n',
        'def one():\n    """One."""\n    return 1\n',
    ),
    (
        "mbpp",
        {
            "text": "Add one.",
            "code": "def f(x): return x + 1",
            "task_id": 11,
            "test_setup_code": "",
            "test_list": ["assert f(1) == 2"],
            "challenge_test_list": [],
        },
        True,
        "benign",
        "Add one.\n\nYour code must pass these tests:\nassert f(1) == 2",
        "def f(x): return x + 1",
    ),
    ("leetcode", LEET, True, "benign", LEET["query"], LEET["response"]),
    (
        "ifeval",
        {"key": 1000, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        True,
        "benign",
        "No commas.",
        "",
    ),
    (
        "truthfulqa",
        {
            "Type": "Adversarial",
            "Category": "Myths",
            "Question": "Do seeds grow in you?",
            "Best Answer": "No",
            "Best Incorrect Answer": "Yes",
            "Correct Answers": "No; never",
            "Incorrect Answers": "Yes",
            "Source": "https://example.org",
        },
        True,
        "benign",
        "Do seeds grow in you?",
        "No",
    ),
    (
        "truthfulqa",
        {
            "type": "Adversarial",
            "category": "Myths",
            "question": "Do seeds grow in you?",
            "best_answer": "No",
            "correct_answers": ["No"],
            "incorrect_answers": ["Yes"],
            "source": "https://example.org",
        },
        True,
        "benign",
        "Do seeds grow in you?",
        "No",
    ),
    (
        "ultrachat",
        {
            "prompt": "Hello?",
            "prompt_id": "f" * 64,
            "messages": [
                {"role": "user", "content": "Hello?"},
                {"role": "assistant", "content": "Hi!"},
                {"role": "user", "content": "More"},
                {"role": "assistant", "content": "Yes"},
            ],
        },
        True,
        "benign",
        "Hello?",
        "Hi!",
    ),
]
IDS = [f"{case[0]}-{i}" for i, case in enumerate(CASES)]


def read(path, default_kind="harmful", **options):
    return usable_rows(PromptSource(path=str(path), **options), default_kind)


def test_every_preset_has_a_case():
    assert {case[0] for case in CASES} == set(preset_names())


@pytest.mark.parametrize(("preset", "row", "recognised", "kind", "prompt", "answer"), CASES, ids=IDS)
def test_preset_reads_its_public_schema(tmp_path, preset, row, recognised, kind, prompt, answer):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(row).encode()))
    rows, _ = read(file, preset=preset)
    assert (rows[0].prompt, rows[0].answer, rows[0].kind, rows[0].source) == (prompt, answer, kind, preset)
    assert not set(rows[0].columns) & {"prompt", "completion", "prompts", "completions"}
    rows, report = read(file, default_kind="benign" if preset == "alpaca" else "harmful") if recognised else ([], None)
    if recognised:
        assert (rows[0].prompt, rows[0].kind, rows[0].source) == (prompt, kind, preset)
        assert f"preset {preset} recognised by its columns" in report.line()


@pytest.mark.parametrize(
    ("preset", "row"),
    [(c[0], c[1]) for c in CASES if not c[2]],
    ids=[i for i, c in zip(IDS, CASES, strict=True) if not c[2]],
)
def test_ambiguous_columns_are_not_guessed(tmp_path, preset, row):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    _, report = read(tmp_path / "rows.json")
    assert "recognised" not in report.line()


@pytest.mark.parametrize(("preset", "row", "recognised", "kind", "prompt", "answer"), CASES, ids=IDS)
def test_presets_read_parquet_copies_too(tmp_path, preset, row, recognised, kind, prompt, answer):
    row = {name: value for name, value in row.items() if value not in ({}, [{}])}  # parquet has no empty structs
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "part.parquet")
    if get_preset(preset).fits(row):
        rows, _ = read(tmp_path / "part.parquet", preset=preset)
        assert (rows[0].prompt, rows[0].answer) == (prompt, answer)


def test_labels_columns_and_short_answers_go_along(tmp_path):
    (tmp_path / "pku.jsonl").write_text(json.dumps(PKU_16))
    rows, _ = read(tmp_path / "pku.jsonl")
    assert rows[0].columns["safer_response_id"] == 0
    assert rows[0].columns["is_response_1_safe"] is False
    (tmp_path / "gsm.jsonl").write_text(json.dumps(CASES[[c[0] for c in CASES].index("gsm8k")][1]))
    rows, _ = read(tmp_path / "gsm.jsonl")
    assert rows[0].columns["final_answer"] == "1001"


def test_mmlu_files_without_header_keep_their_subject(tmp_path):
    for folder, answer in (("val", "A"), ("dev", "B"), ("test", "C")):
        (tmp_path / folder).mkdir()
        with (tmp_path / folder / f"high_school_maths_{folder}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerow([f"Which, of\nthese, {folder}?", "1", "2", "3", "4", answer])
    rows, _ = read(tmp_path, preset="mmlu", split="validation")
    assert [(row.answer, row.columns["subject"]) for row in rows] == [("A", "high_school_maths")]
    assert rows[0].prompt.startswith("Which, of\nthese, val?\n\nA. 1")
    assert [row.answer for row in read(tmp_path, preset="mmlu", split="dev")[0]] == ["B"]
    assert [row.answer for row in read(tmp_path, preset="mmlu", split="test")[0]] == ["C"]
    with pytest.raises(DataError, match="no file of the split 'train'"):
        read(tmp_path, preset="mmlu")


def test_catqa_nested_json(tmp_path):
    document = {"Illegal Activity": {"Drug:": ["One?", "Two?"]}, "Fraud": {"Tax, other": ["Three?"]}}
    (tmp_path / "catqa english.json").write_text(json.dumps(document))
    rows, report = read(tmp_path / "catqa english.json")
    assert [row.prompt for row in rows] == ["One?", "Two?", "Three?"]
    assert rows[2].columns == {"Category": "Fraud", "Subcategory": "Tax, other"}
    assert "preset catqa" in report.line()


def test_a_part_of_a_dataset_may_be_of_the_other_kind(tmp_path):
    row = {"Goal": "Bake", "Target": "Sure", "Behavior": "Bake", "Category": "Food", "Source": "Original"}
    for name in ("harmful-behaviors", "benign-behaviors"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "harmful-behaviors.jsonl")[0][0].kind == "harmful"
    assert read(tmp_path / "benign-behaviors.jsonl")[0][0].kind == "benign"
    (tmp_path / "or-bench-toxic.csv").write_text("prompt,category\nBad?,violence\n")
    assert read(tmp_path / "or-bench-toxic.csv", preset="or_bench")[0][0].kind == "harmful"


def test_a_layout_that_many_sets_share_takes_its_kind_from_its_place(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"instruction": "Do bad", "input": "", "output": "No"}]))
    rows, report = read(tmp_path / "x.json", default_kind="harmful")
    assert rows[0].kind == "harmful"
    assert "taken as harmful" in report.line()
    assert read(tmp_path / "x.json", default_kind="harmful", preset="alpaca")[0][0].kind == "benign"
    assert read(tmp_path / "x.json", default_kind="harmful", kind="benign")[0][0].kind == "benign"


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_refuses_rows_of_another_schema(tmp_path, preset):
    (tmp_path / "x.jsonl").write_text('{"unrelated": "text"}')
    with pytest.raises(DataError, match=f"line 1: preset '{preset}' needs the columns"):
        read(tmp_path / "x.jsonl", preset=preset)


@pytest.mark.parametrize(("preset", "row", "recognised", "kind", "prompt", "answer"), CASES, ids=IDS)
def test_null_columns_never_become_the_word_none(tmp_path, preset, row, recognised, kind, prompt, answer):
    (tmp_path / "x.jsonl").write_text(json.dumps(dict.fromkeys(row)))
    with pytest.raises(DataError, match="line 1: "):
        read(tmp_path / "x.jsonl", preset=preset)


ANSWERS = {
    "alpaca": ("output",),
    "alpaca_farm": ("output",),
    "dolly": ("response",),
    "gsm8k": ("answer",),
    "svamp": ("Answer",),
    "arc": ("answerKey",),
    "humaneval": ("canonical_solution",),
    "mbpp": ("code",),
    "leetcode": ("response",),
    "truthfulqa": ("Best Answer", "best_answer"),
    "coconot_contrast": ("response",),
}
"""The columns of a preset's reference answer; those of `mmlu` and `ultrachat` are no text."""


@pytest.mark.parametrize("nothing", [None, float("nan")])
@pytest.mark.parametrize("preset", ANSWERS)
def test_an_answer_that_is_missing_is_empty(tmp_path, preset, nothing):
    """It was None, or the text None, to calibrate on and to compare with."""
    seen = 0
    for row in (cast("dict[str, Any]", case[1]) for case in CASES if case[0] == preset):
        (tmp_path / "x.jsonl").write_text(json.dumps(row | {c: nothing for c in ANSWERS[preset] if c in row}))
        rows, _ = read(tmp_path / "x.jsonl", preset=preset)
        assert rows[0].answer == ""
        assert not rows[0].columns.get("final_answer")
        seen += 1
    assert seen
    assert set(ANSWERS) | {"mmlu", "ultrachat"} == {name for name in preset_names() if get_preset(name).answer}


def test_a_missing_option_or_message_is_not_the_word_none(tmp_path):
    options = {"question": "Which?", "A": "1", "B": None, "C": "3", "D": "4", "answer": "A"}
    (tmp_path / "x.jsonl").write_text(json.dumps(options))
    with pytest.raises(DataError, match="line 1: preset mmlu cannot read it: option B is missing"):
        read(tmp_path / "x.jsonl", preset="mmlu")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": None}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Hello", "prompt_id": "1", "messages": turns}))
    assert read(tmp_path / "x.jsonl", preset="ultrachat")[0][0].answer == ""


def test_adding_a_preset_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_PRESETS", dict(registry._PRESETS))
    register(Preset(name="mine", kind="harmful", requires=(("ask", "why"),), prompt="ask", keep=("why",)))
    (tmp_path / "x.csv").write_text("ask,why\nBad?,because\n")
    rows, _ = read(tmp_path / "x.csv")
    assert (rows[0].prompt, rows[0].skill, rows[0].columns) == ("Bad?", "mine", {"why": "because"})
    with pytest.raises(ValueError, match="already registered"):
        register(Preset(name="mine", kind="harmful", requires=(("ask",),), prompt="ask"))


def test_two_presets_that_fit_equally_well_are_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_PRESETS", dict(registry._PRESETS))
    for name in ("one", "two"):
        register(Preset(name=name, kind="harmful", requires=(("ask", "why"),), prompt="ask"))
    (tmp_path / "x.csv").write_text("ask,why\nBad?,because\n")
    with pytest.raises(DataError, match=r"no preset fits(.|\n)*one \(ask, why\); two \(ask, why\)"):
        read(tmp_path / "x.csv")


def test_unknown_preset_suggests_a_name():
    with pytest.raises(DataError, match="Did you mean 'gsm8k'"):
        get_preset("gsm8")
