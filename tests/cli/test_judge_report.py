"""The judge command: scores, agreement with labels, and messages for files that don't fit."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nspo_lightning.cli.judge import judge_file, main
from nspo_lightning.rewards import OutcomeReward, RulesJudge, SafetyAndAnswers
from nspo_lightning.rewards.rules.labels import label_agreement

CONFIGS = Path(__file__).parents[2] / "configs"

REFUSED, HELPED = "I'm sorry, but I can't help with that.", "Step one: open the box."
ROWS = [
    {"prompt": "How?", "response": REFUSED, "category": {"a,b": False}, "is_safe": True},
    {"prompt": "How?", "response": HELPED, "category": {"a,b": True}, "is_safe": False},
    {"prompt": "Why?", "response": HELPED, "category": {"a,b": False}, "is_safe": True},
    {"prompt": "Why?", "response": REFUSED, "category": {"a,b": False}, "is_safe": True},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


def reward():
    return OutcomeReward(RulesJudge(), garbage=0.0)


def test_command_scores_and_compares(tmp_path, monkeypatch, console):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "rows.jsonl", ROWS)
    main(["-c", str(CONFIGS / "judge-rules.yaml"), "--input", data, "--batch_size", "3"], console)
    text = console.file.getvalue()
    for expected in ("accuracy", "0.7500", "precision", "0.5000", "recall", "1.0000", "auroc", "0.8333", "rows.scores"):
        assert expected in text
    lines = [json.loads(line) for line in (tmp_path / "rows.scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert [line["reward"] for line in lines] == [0.0, -1.0, -1.0, 0.0]
    assert [line["safety/outcome"] for line in lines] == ["refusal", "unsafe", "unsafe", "refusal"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_training_config_serves_too(tmp_path, console):
    config = tmp_path / "train.yaml"
    config.write_text(
        "trainer: {max_steps: 3}\nmodel:\n  group_size: 4\n  reward:\n    class_path: RefusalReward\n"
        "    init_args: {refused: 7}\ndata: {}\n"
    )
    data = write(tmp_path / "rows.jsonl", ROWS[:1])
    main([f"--config={config}", "--input", data, "--output", str(tmp_path / "o" / "s.jsonl")], console)
    assert json.loads((tmp_path / "o" / "s.jsonl").read_text())["reward"] == 7.0


@pytest.mark.parametrize(
    ("column", "values", "options"),
    [
        ("unsafe", [0, 1, 0, 0], {}),
        ("is_unsafe", ["false", "true", "false", "false"], {}),
        ("verdict", ["safe", "unsafe", "safe", "safe"], {"label_column": "verdict"}),
        ("verdict", [1, 0, 1, 1], {"label_column": "verdict", "label_true_means": "safe"}),
    ],
)
def test_spellings_of_labels(tmp_path, console, column, values, options):
    rows = [{"prompt": r["prompt"], "completion": r["response"], column: v} for r, v in zip(ROWS, values, strict=True)]
    found = judge_file(
        reward(), input=write(tmp_path / "r.jsonl", rows), output=str(tmp_path / "s"), console=console, **options
    )
    assert found is not None
    assert (found.true_negatives, found.false_positives, found.false_negatives, found.true_positives) == (2, 1, 0, 1)


def test_csv_with_some_labels_missing(tmp_path, console):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response", "is_safe"])
        writer.writeheader()
        writer.writerows([{"prompt": "a", "response": HELPED, "is_safe": v} for v in ("False", "", "true")])
    found = judge_file(reward(), input=str(tmp_path / "rows.csv"), output=str(tmp_path / "s"), console=console)
    assert found is not None
    assert found.count == 2
    assert math.isnan(found.auroc) is False


def test_without_labels_there_is_no_agreement(tmp_path, console):
    rows = [{"prompt": "a", "response": HELPED}]
    assert (
        judge_file(reward(), input=write(tmp_path / "r.jsonl", rows), output=str(tmp_path / "s"), console=console)
        is None
    )
    assert "accuracy" not in console.file.getvalue()


def test_columns_of_some_rows_alone_stay_out_of_the_lines(tmp_path, console):
    rows = [{"prompt": "Burn", "completion": HELPED, "kind": k, "answer": HELPED} for k in ("harmful", "benign")]
    mixed = SafetyAndAnswers(reward())
    judge_file(mixed, input=write(tmp_path / "r.jsonl", rows), output=str(tmp_path / "s"), console=console)
    lines = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [-1.0, 1.0]
    assert not any("safety/outcome" in line for line in lines)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "holds no rows|is empty|no rows"),
        ([{"prompt": "a", "reply": "b"}], {}, "none of the columns completion, response.*reply.*`completion_column`"),
        ([{"question": "a", "response": "b"}], {}, "no column 'prompt'.*question.*`prompt_column`"),
        ([{"prompt": "a", "response": None}], {}, "'response' must hold text or chat messages.*NoneType"),
        ([{"prompt": "a", "response": "b", "is_safe": "perhaps"}], {}, "label in 'is_safe' must be.*perhaps"),
        (
            [{"prompt": "a", "response": "b", "y": 1}],
            {"label_column": "y"},
            "can mean safe or unsafe.*`label_true_means`",
        ),
        ([{"prompt": "a", "response": "b"}], {"batch_size": 0}, "`batch_size` and `limit`"),
    ],
)
def test_files_that_do_not_fit(tmp_path, console, rows, options, message):
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        judge_file(reward(), input=data, output=str(tmp_path / "s.jsonl"), console=console, **options)
    assert not (tmp_path / "s.jsonl").exists()


def test_missing_file(tmp_path, console):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        judge_file(reward(), input=str(tmp_path / "nowhere.jsonl"), console=console)


def test_a_failing_reward_leaves_no_complete_looking_file(tmp_path, console):
    def bad(completions, **columns):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="Reward 'bad' returned nan"):
        judge_file(bad, input=write(tmp_path / "r.jsonl", ROWS), output=str(tmp_path / "s.jsonl"), console=console)
    assert not (tmp_path / "s.jsonl").exists()


def test_agreement_by_hand():
    scores = torch.tensor([-1.0, -0.5, 0.0, 2.0])
    unsafe = torch.tensor([True, False, True, False])
    found = label_agreement(scores, unsafe)
    assert (found.accuracy, found.precision, found.recall) == (0.5, 0.5, 0.5)
    # Pairs (unsafe, safe) ordered right: -1 < -0.5, -1 < 2, 0 < 2; wrong: 0 > -0.5.
    assert found.auroc == pytest.approx(3 / 4)


def test_auroc_keeps_the_order_of_large_scores():
    # A sigmoid would make 50, 60 and 70 one and the same number in float32.
    found = label_agreement(torch.tensor([-80.0, -70.0, -60.0, -50.0]), torch.tensor([True, True, False, False]), -65.0)
    assert found.auroc == 1.0
    assert found.accuracy == 1.0


def test_undefined_figures_are_nan():
    found = label_agreement(torch.tensor([1.0, 2.0]), torch.tensor([False, False]))
    assert found.accuracy == 1.0
    assert all(math.isnan(value) for value in (found.precision, found.recall, found.auroc))
    with pytest.raises(ValueError, match="non-empty shape"):
        label_agreement(torch.tensor([]), torch.tensor([], dtype=torch.bool))
