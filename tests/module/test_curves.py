"""Curves in TensorBoard have a point where something was measured, and none where it was not."""

from __future__ import annotations

import pytest
import tiny_jobs
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nspo_lightning.callbacks import NullSpaceProjection

SCORED = ("entropy", "loss", "clip_ratio/region_mean", "grad_norm")
STEPPED = ("nullspace/leak_max", "nullspace/grad_norm_after", "nullspace/kept_gradient_energy")
COUNTED = ("updates_skipped", "updates_nonfinite")
ALWAYS = ("reward", "answered", "completions/mean_length", "step_time", "learning_rate", *COUNTED)


def curves(folder) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


class SometimesTheSame:
    """Tells completions apart at some rollouts alone."""

    def __init__(self, told_apart) -> None:
        self.told_apart, self.rollout = told_apart, -1

    def __call__(self, prompts, completions, completion_ids, **_):
        self.rollout += 1
        if self.rollout in self.told_apart:
            return tiny_jobs.even_tokens(prompts, completions, completion_ids)
        return [1.0] * len(completions)


def train(tiny_llama, folder, told_apart, steps, **options) -> dict[str, dict[int, float]]:
    reward = SometimesTheSame(told_apart)

    def score(prompts, completions, completion_ids, **columns):
        return reward(prompts, completions, completion_ids)

    policy = tiny_jobs.module(tiny_llama, reward=score)
    logger = TensorBoardLogger(folder, name="", version="")
    run = tiny_jobs.trainer(folder, steps=steps, logger=logger, callbacks=[NullSpaceProjection()], **options)
    run.fit(policy, tiny_jobs.datamodule())
    return curves(folder)


@pytest.mark.filterwarnings("ignore")
def test_skipped_steps_have_no_point_of_what_they_did_not_measure(tiny_llama, tmp_path):
    found = train(tiny_llama, tmp_path, {0, 3}, 5)
    for name in (*SCORED, *STEPPED):
        assert sorted(found[name]) == [0, 3], name
    for name in ALWAYS:
        assert sorted(found[name]) == [0, 1, 2, 3, 4], name
    assert [found["updates_skipped"][step] for step in range(5)] == [0, 1, 2, 2, 3]
    assert found["entropy"][0] != found["entropy"][3]


@pytest.mark.filterwarnings("ignore")
def test_a_window_has_the_points_of_any_of_its_batches(tiny_llama, tmp_path):
    found = train(tiny_llama, tmp_path, {0, 5}, 3, accumulate_grad_batches=2)  # windows: 0 1, 2 3, 4 5
    for name in (*SCORED, *STEPPED):
        assert sorted(found[name]) == [0, 2], name
    assert sorted(found["reward"]) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore")
def test_curves_of_validation_are_validations_alone(tiny_llama, tmp_path):
    """What `test` and `validate` measure later stands in the same folder, at the step of what was measured."""
    data, options = tiny_jobs.datamodule(), {"limit_val_batches": 1.0, "val_check_interval": 1}

    def job(steps=2):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        return tiny_jobs.trainer(tmp_path, steps=steps, logger=logger, num_sanity_val_steps=0, **options)

    run = job()
    run.fit(tiny_jobs.module(tiny_llama), data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    fitted = curves(tmp_path)["safety/answered_rate"]
    job().test(tiny_jobs.module(tiny_llama), data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    found = curves(tmp_path)
    assert found["safety/answered_rate"] == fitted
    assert sorted(fitted) == [0, 1], "Lightning's count of steps begins at 0"
    assert sorted(found["test/safety/answered_rate"]) == [1]
    job().validate(tiny_jobs.module(tiny_llama), data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert curves(tmp_path)["safety/answered_rate"] == fitted, "measured again at the same step, not at step 0"
