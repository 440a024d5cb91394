"""Every mistake of the table: the right exit code, one message on one screen, no traceback, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mistakes_table import MISTAKES
from workspace import Shown, build, run, tree, write_lines

SCREEN_LINES = 24


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    build(folder, tiny_llama)
    return folder


def check(shown: Shown, code: int, says: str) -> None:
    assert shown.code == code, shown.err
    assert "Traceback" not in shown.err + shown.out
    assert re.search(says, shown.err, re.DOTALL), shown.err
    assert len(shown.err.splitlines()) <= SCREEN_LINES
    assert len(re.findall(r"^error: ", shown.err, re.MULTILINE)) == 1


def test_the_table_is_long_enough() -> None:
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing(name: str, job: Path) -> None:
    before = tree(job)
    mistake = MISTAKES[name]
    check(run(job, *mistake.arguments), mistake.code, mistake.says)
    assert tree(job) == before
    assert not list(job.glob("planted*")), "code in a file was run"


def test_a_mistake_after_a_good_run_leaves_that_run_in_its_place(job: Path) -> None:
    assert run(job, "fit", "-c", "config.yaml", "--name=good").code == 0
    before = tree(job)
    assert any("runs/good/adapter" in name for name in before)
    check(run(job, "fit", "-c", "config.yaml", "--name=good", "--data.safety=nothing.jsonl"), 1, "nothing.jsonl")
    assert tree(job) == before
    resumed = ("--ckpt_path=last", "--data.safety=nothing.jsonl")
    check(run(job, "fit", "-c", "config.yaml", "--name=good", *resumed), 1, "nothing.jsonl")
    assert tree(job) == before


def test_a_mistake_in_a_late_row_of_a_long_file_is_named_by_its_line(job: Path) -> None:
    rows = [{"prompt": f"How do I burn mill {i}?"} for i in range(500)]
    write_lines(job / "broken" / "late.jsonl", [*rows, {"prompt": None}])
    check(run(job, "fit", "-c", "config.yaml", "--data.safety=broken/late.jsonl"), 1, r"late\.jsonl, line 501")


def test_a_bug_keeps_its_traceback(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nspo_lightning.module.grpo_module import GRPOModule

    def broken(self: GRPOModule, batch: object, batch_idx: int) -> None:
        [].pop()

    monkeypatch.setattr(GRPOModule, "training_step", broken)
    with pytest.raises(IndexError):
        run(job, "fit", "-c", "config.yaml", "--name=bug")


def test_the_traceback_of_a_mistake_can_be_had(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSPO_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="group_size"):
        run(job, "fit", "-c", "config.yaml", "--model.group_size=1")
