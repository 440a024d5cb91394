"""What `fit` measures before and after: as many rows as `limit_test_batches` says, and it says how many there are."""

from __future__ import annotations

import json

import pytest
import tiny_jobs
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nspo_lightning.callbacks import RunProgress, RunReport


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
    assert ("after/safety/unsafe_rate" in summary) == (each > 0)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("Measuring")]
    assert lines == [f"Measuring {when} training: {2 * each} rows ..." for when in ("before", "after") if each]
    assert ("Held-out prompts" in said.out) == (each > 0)


def test_a_limit_that_leaves_nothing_is_refused(tiny_llama, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"limit_test_batches` is 0\.1, which leaves none of 2 batches"):
        fit(tiny_llama, tmp_path, limit_test_batches=0.1, enable_progress_bar=True)
