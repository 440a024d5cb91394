"""What a cell of a file means: labels of harm by one vocabulary, and NaN is nothing."""

from __future__ import annotations

import json
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nspo_lightning.datamodules import AlignmentDataModule, DataError, PromptSource
from nspo_lightning.datamodules.sources.read import usable_rows
from nspo_lightning.datamodules.sources.readers import read_file
from nspo_lightning.datamodules.sources.source import as_sources
from nspo_lightning.rewards.rules.labels import harmful_rows
from nspo_lightning.terminal import counted

HARMFUL = ["harmful", "Unsafe", "toxic", True, 1, 1.0, "1", " true ", "yes"]
BENIGN = ["benign", "safe", "Harmless", "unharmful", False, 0, 0.0, "0", "FALSE", "no"]


def rows_of(path, default_kind="harmful", **options):
    return usable_rows(PromptSource(path=str(path), **options), default_kind)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("default", ["harmful", "benign"])
def test_a_label_is_read_alike_by_data_and_rewards(tmp_path, default):
    labels = [*HARMFUL, *BENIGN]
    file = write(tmp_path / "x.jsonl", [{"prompt": f"p{i}", "kind": label} for i, label in enumerate(labels)])
    kinds = [row.kind for row in rows_of(file, default)[0]]
    assert kinds == ["harmful"] * len(HARMFUL) + ["benign"] * len(BENIGN)
    assert harmful_rows("kind", {"kind": labels}, len(labels)) == [kind == "harmful" for kind in kinds]


@pytest.mark.parametrize("empty", [None, "", float("nan")])
def test_an_empty_label_is_what_the_place_says(tmp_path, empty):
    file = write(tmp_path / "x.jsonl", [{"prompt": "a", "kind": "safe"}, {"prompt": "b", "kind": empty}])
    assert [row.kind for row in rows_of(file, "harmful")[0]] == ["benign", "harmful"]
    assert [row.kind for row in rows_of(file, "benign")[0]] == ["benign", "benign"]


@pytest.mark.parametrize("label", ["math", 2, -1, "saef", ["safe"]])
def test_an_unknown_label_is_refused_by_row(tmp_path, label):
    file = write(tmp_path / "x.jsonl", [{"prompt": "a", "kind": "safe"}, {"prompt": "b", "kind": label}])
    with pytest.raises(DataError, match="line 2: the column 'kind' says neither harmful nor benign") as caught:
        rows_of(file)
    assert "harmless" in str(caught.value)
    assert "bad_rows: drop" in str(caught.value)
    rows, report = rows_of(file, bad_rows="drop")
    assert ([row.prompt for row in rows], report.dropped.total()) == (["a"], 1)
    assert [row.kind for row in rows_of(file, kind="benign")[0]] == ["benign", "benign"]


def test_presets_read_labels_by_the_same_vocabulary(tmp_path):
    row = {"prompt": "How do I kill a process?", "type": "homonyms", "focus": "kill"}
    labels = ["Safe ", "unsafe", "harmless", "harmful"]
    file = write(tmp_path / "x.jsonl", [{**row, "prompt": f"p{i}", "label": x} for i, x in enumerate(labels)])
    rows, _ = rows_of(file)
    assert [r.kind for r in rows] == ["benign", "harmful", "benign", "harmful"]
    assert [r.skill for r in rows] == ["over_refusal", "xstest_unsafe"] * 2
    write(file, [{**row, "label": "contrast"}])
    with pytest.raises(DataError, match="line 1: the column 'label' says neither"):
        rows_of(file)


def test_a_source_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        as_sources(PromptSource(path="x", kind=cast(Any, "safe")), "safety")


def test_nan_is_no_answer_in_any_format(tmp_path, tokenizer):
    nan = float("nan")
    table = pa.table({"prompt": ["a", "b", "c"], "answer": ["yes", None, "4"], "points": [1.0, nan, None]})
    pq.write_table(table, tmp_path / "text.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "answer": [1.5, nan, 4.5]}), tmp_path / "numbers.parquet")
    (tmp_path / "x.csv").write_text("prompt,answer\na,yes\nb,nan\nc,NaN\nd,\ne,<NA>\nf,nanny\n")
    write(tmp_path / "x.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": nan}])
    (tmp_path / "x.json").write_text('[{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": NaN}]')
    expected = {
        "text.parquet": ["yes", "", "4"],
        "numbers.parquet": ["1.5", "", "4.5"],
        "x.csv": ["yes", "", "", "", "", "nanny"],
        "x.jsonl": ["1", ""],
        "x.json": ["1", ""],
    }
    for name, answers in expected.items():
        rows, report = rows_of(tmp_path / name, "benign")
        assert [row.answer for row in rows] == answers, name
        skill = name.split(".")[0]
        assert f"{counted(answers.count(''), 'row')} of skill {skill} with an empty answer: not scored" in report.line()
    data = AlignmentDataModule(
        "toy/harmful",
        str(tmp_path / "x.csv"),
        tokenizer=tokenizer,
        general_val="toy/general",
        general_test="toy/general",
    )
    for batch in data.calibration_dataloader():
        texts = tokenizer.batch_decode(batch["input_ids"])
        assert not any("nan" in text.lower().replace("nanny", "") for text in texts)


def test_a_function_of_rows_may_give_nan(tmp_path):
    rows = [{"prompt": "a", "answer": "b", "note": float("nan")}, {"prompt": "c", "answer": float("nan")}]
    found, _ = usable_rows(PromptSource(rows=lambda split: rows), "benign")
    assert [row.answer for row in found] == ["b", ""]
    assert found[0].columns == {"note": None, "final_answer": "b"}


def test_a_prompt_that_is_nan_is_a_bad_row(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,answer\nnan,1\n")
    with pytest.raises(DataError, match="line 2: the prompt is null"):
        rows_of(tmp_path / "x.csv")


def test_text_of_a_typed_file_is_text(tmp_path):
    write(tmp_path / "x.jsonl", [{"prompt": "What is 0/0 in JavaScript?", "answer": "NaN"}])
    assert rows_of(tmp_path / "x.jsonl")[0][0].answer == "NaN"
    assert next(read_file(tmp_path / "x.jsonl")).data["answer"] == "NaN"
