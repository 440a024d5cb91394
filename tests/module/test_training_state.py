"""TRL's reward signature under a real Trainer: what a reward is told about training."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_jobs import Recorder, datamodule, even_tokens, module, trainer

from nspo_lightning.rewards import RewardError


class Told:
    """TRL's example: a reward that asks where training is."""

    name = "told"

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        self.seen.append(dict(vars(trainer_state)))
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("told/step", trainer_state.global_step)
        return even_tokens(prompts, completions, completion_ids)


def test_a_reward_with_trls_signature_is_told_where_training_is(tiny_llama, tmp_path):
    told, recorder = Told(), Recorder()
    policy = module(tiny_llama, reward=told)
    run = trainer(tmp_path, steps=-1, max_epochs=2, limit_train_batches=3, callbacks=[recorder])
    run.fit(policy, datamodule())
    assert [seen["global_step"] for seen in told.seen] == list(range(6))
    assert [seen["epoch"] for seen in told.seen] == pytest.approx([i / 3 for i in range(6)])
    assert {seen["max_steps"] for seen in told.seen} == {6}
    assert {seen["num_train_epochs"] for seen in told.seen} == {2}
    assert {seen["train_batch_size"] for seen in told.seen} == {2}
    tokens = [seen["num_input_tokens_seen"] for seen in told.seen]
    assert tokens[0] == 0
    assert tokens[1:] == [step["num_tokens"] for step in recorder.steps[:5]]
    assert all(seen["is_world_process_zero"] and seen["is_local_process_zero"] for seen in told.seen)
    assert [step["told/step"] for step in recorder.steps] == list(range(6))
    assert policy.last_rollout is not None
    assert "length" in policy.last_rollout.rows()[0]


def test_predict_tells_where_training_was(tiny_llama, tmp_path):
    told = Told()
    policy = module(tiny_llama, reward=told)
    run = trainer(tmp_path, steps=3)
    run.fit(policy, datamodule())
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = Told()
    trainer(tmp_path).predict(module(tiny_llama, reward=again), datamodule(), ckpt_path=tmp_path / "end.ckpt")
    assert {seen["global_step"] for seen in again.seen} == {3}
    assert not any("max_steps" in seen for seen in again.seen)


def test_training_without_an_end_has_no_last_step(tiny_llama, tmp_path):
    def schedule(prompts, completions, trainer_state, **_):
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    with pytest.raises(RewardError, match="`trainer_state.max_steps` is not known: training has no end"):
        trainer(tmp_path, steps=-1, max_epochs=-1).fit(module(tiny_llama, reward=schedule), datamodule())
