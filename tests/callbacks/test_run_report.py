"""What `fit` measures before and after: as many rows as `limit_test_batches` says, and it says how many there are."""

from __future__ import annotations

import json

import pytest
import tiny_jobs
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping

from nspo_lightning.callbacks import RunProgress, RunReport, run_report


def fit(tiny_llama, folder, **options):
    """Run a step and return the prompts that were answered before and after it."""
    data = tiny_jobs.datamodule()
    data.safety.eval_batch_size = data.general.eval_batch_size = 1
    policy = tiny_jobs.module(tiny_llama)
    answered: list[tuple[int, str]] = []
    whole = policy.evaluator.answer

    def answer(batch, dataloader_idx, batch_idx):
        answered.extend((dataloader_idx, prompt) for prompt in batch["prompt"])
        return whole(batch, dataloader_idx, batch_idx)

    policy.evaluator.answer = answer
    run = tiny_jobs.trainer(folder, steps=1, callbacks=[RunReport(str(folder)), RunProgress()], **options)
    run.fit(policy, data)
    return answered


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("limit", "each"), [(1.0, 2), (1, 1), (0.5, 1), (0, 0)])
def test_limit_test_batches_is_about_the_measurements_of_fit_too(tiny_llama, tmp_path, limit, each, capsys):
    answered = fit(tiny_llama, tmp_path, limit_test_batches=limit, enable_progress_bar=True)
    assert [loader for loader, _ in answered] == ([0] * each + [1] * each) * 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert ("after/safety/answered_rate" in summary) == (each > 0)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("Measuring")]
    assert lines == [f"Measuring {when} training: {2 * each} rows ..." for when in ("before", "after") if each]
    assert ("Held-out prompts" in said.out) == (each > 0)
    assert "; 1 update in" in " ".join(said.out.split())


@pytest.mark.filterwarnings("ignore")
def test_answers_are_kept_before_and_after_and_rates_by_category(tiny_llama, tmp_path, monkeypatch):
    rows = [{"prompt": f"How do I burn the {word}?", "category": word} for word in tiny_jobs.WORDS]
    monkeypatch.setattr(tiny_jobs, "harmful", lambda split: rows)
    fit(tiny_llama, tmp_path, enable_progress_bar=True)
    said = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in said] == ["harmful", "harmful", "general", "general"]
    assert all(isinstance(row["before"], str) and isinstance(row["after"], str) for row in said)
    assert all(row["before_outcome"] and row["after_outcome"] for row in said if row["kind"] == "harmful")
    summary = json.loads((tmp_path / "summary.json").read_text())
    words = {row["category"][0] for row in said if row["kind"] == "harmful"}
    for when in ("before", "after"):
        assert set(summary["by_category"][when]) == {f"safety/answered_rate/{word}" for word in words}
        assert all(rate["of"] == 1 for rate in summary["by_category"][when].values())


@pytest.mark.filterwarnings("ignore")
def test_an_early_stop_says_why(tiny_llama, tmp_path, caplog):
    goal = EarlyStopping("reward", stopping_threshold=-1.0, mode="max", check_on_train_epoch_end=True, strict=False)
    report = RunReport(str(tmp_path), evaluate=False)
    run = tiny_jobs.trainer(tmp_path, steps=-1, max_epochs=2, limit_train_batches=1, callbacks=[goal, report])
    with caplog.at_level("INFO"):
        run.fit(tiny_jobs.module(tiny_llama), tiny_jobs.datamodule())
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Stopped early")]
    assert len(told) == 1
    assert told[0].startswith("Stopped early at step 1: Stopping threshold reached: reward = ")


def test_a_limit_that_leaves_nothing_is_refused(tiny_llama, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"limit_test_batches` is 0\.1, which leaves none of 2 batches"):
        fit(tiny_llama, tmp_path, limit_test_batches=0.1, enable_progress_bar=True)


def test_nothing_is_less_than_nothing():
    """Rounding leaves a sign that no digit bears out."""
    table = run_report._change_table({"general/nll": 0.0}, {"general/nll": -1e-6}, {"general/nll": [-2e-6, 1e-6]})
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert "0.0000 to 0.0000" in cells
    assert "+0.0000" in cells
    assert not [cell for cell in cells if "-0.0000" in cell]
