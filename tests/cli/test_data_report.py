"""What the data command prints and returns."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from nspo_lightning.cli.data import data_report, length_summary
from nspo_lightning.datamodules import AlignmentDataModule, DataError, PromptSource


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    harmful = [{"prompt": f"Bad thing [bold]{i}[/bold]"} for i in range(40)] + [{"prompt": "x" * 500}]
    general = [{"prompt": f"Sum {i}", "answer": f"answer {i}", "skill": f"skill{i % 4}"} for i in range(40)]
    return write("harmful.jsonl", harmful), write("general.jsonl", general)


class Characters:
    """One token a character."""

    chat_template = "yes"
    pad_token_id = eos_token_id = 0

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + ("<assistant>" if add_generation_prompt else "")

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def report(files, width=150, **options):
    stream = io.StringIO()
    safety, general = files
    data = AlignmentDataModule(safety, general, **{"max_prompt_tokens": 100, "tokenizer": Characters(), **options})
    figures = data_report(data, Console(file=stream, width=width))
    return stream.getvalue(), figures


def test_counts_drops_lengths_and_three_examples_of_each(files):
    text, figures = report(files)
    assert figures["sources"][0]["read"] == 41
    assert figures["sources"][0]["dropped"] == {"longer than 100 tokens": 1}
    assert figures["sources"][0]["splits"] == {"train": 32, "validation": 4, "test": 4}
    assert figures["training"]["rows"] == 32
    assert figures["calibration"]["rows"] == 32
    assert figures["training"]["tokens"]["max"] == len("<user>Bad thing [bold]10[/bold]<assistant>")
    assert "1 longer than 100 tokens" in text
    for use in (
        "training",
        "calibration",
        "validation: safety",
        "validation: general",
        "test: safety",
        "test: general",
    ):
        assert text.count(f"─ {use} · ") == 3
    assert "<user>Bad thing [bold]" in text, "template applied, markup shown as it is"
    assert "<assistant>answer " in text, "calibration text holds the reference answer"


def test_rows_are_counted_by_kind_and_each_example_names_its_own(files):
    safety, general = files
    mixed = [PromptSource(path=safety, kind="harmful"), PromptSource(path=general, kind="benign")]
    text, figures = report((mixed, general))
    assert figures["training"]["kinds"] == {"harmful": 32, "benign": 32}
    assert "harmful 32" in text
    assert {"harmful", "benign"} == {
        line.split("·")[2].split()[0] for line in text.splitlines() if line.startswith("╭─ training ·")
    }


def test_examples_come_from_different_domains(files):
    text, figures = report(files)
    shown = {line.split("·")[1].split()[0] for line in text.splitlines() if line.startswith("╭─ calibration ·")}
    assert len(shown) == 3
    assert sum(figures["calibration"]["domains"].values()) == 32


def test_model_answers_are_announced_not_invented(files):
    text, _ = report(files, calibration_text="prompt_and_model_answer")
    assert "answers by the policy not shown" in text
    assert "<assistant>answer " not in text


def test_bad_data_is_an_error(files, tmp_path):
    (tmp_path / "bad.csv").write_text("ask\n1\n")
    with pytest.raises(DataError, match="prompt_column"):
        report((str(tmp_path / "bad.csv"), files[1]))


def test_length_summary():
    assert length_summary([3, 1, 2]) == {"min": 1, "median": 2, "p95": 3, "max": 3, "total": 6}
    assert length_summary([]) == dict.fromkeys(("min", "median", "p95", "max", "total"), 0)


def test_it_fits_in_80_columns_and_breaks_no_word(files):
    text, _ = report(files, width=80)
    assert max(map(len, text.splitlines())) <= 80
    tables = text[: text.index("\u256d")]
    for whole in (
        "left out, and why",
        "1 longer than 100",
        "tokens a text",
        "kinds and domains",
        "harmful 32",
        "skill3 8",
    ):
        assert whole in tables, tables
