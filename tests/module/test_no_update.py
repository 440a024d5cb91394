"""A run that learns nothing says so: rewards that are all None or all alike, updates that were skipped."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_jobs import adapter, constant, datamodule, even_tokens, module, trainer

from nspo_lightning.callbacks import RunReport
from nspo_lightning.checkpoints import read_checkpoint, updates_in
from nspo_lightning.cli.errors import is_users_mistake
from nspo_lightning.module.progress import Progress
from nspo_lightning.module.rollout_metrics import JudgedRows
from nspo_lightning.module.scored_rollouts import ScoredRollouts
from nspo_lightning.module.signal import NoSignalError, Signal
from nspo_lightning.rewards import RewardError, RewardResult


def nothing(prompts: list[str], completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def nothing_good(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class Scripted:
    """One of the rewards above after the other, a rollout each; the last stays."""

    name = "scripted"

    def __init__(self, *rewards: Any) -> None:
        self.rewards = list(rewards)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        reward = self.rewards.pop(0) if len(self.rewards) > 1 else self.rewards[0]
        return reward(prompts, completions, **columns)


def test_rewards_that_are_all_none_are_warned_of_at_once_and_end_the_run(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=nothing, max_unscored_rollouts=3)
    with (
        pytest.warns(UserWarning, match=r"'nothing' gave None for all 8 completions of rollout 1"),
        pytest.raises(RewardError, match=r"3 rollouts in a row.*`max_unscored_rollouts`"),
    ):
        trainer(tmp_path, steps=6).fit(policy, datamodule())
    assert policy.rollouts == 3
    assert policy.updates == 0


def test_a_run_that_ends_before_that_without_any_score_ends_as_an_error_too(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=nothing, max_unscored_rollouts=100)
    none = pytest.warns(UserWarning, match="gave None for all")
    with none, pytest.raises(RewardError, match="not one completion of 2 rollouts was scored"):
        trainer(tmp_path, steps=2).fit(policy, datamodule())


def test_a_score_in_between_begins_the_count_anew(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=Scripted(nothing, even_tokens, nothing, even_tokens), max_unscored_rollouts=2)
    with pytest.warns(UserWarning, match="gave None for all"):
        trainer(tmp_path, steps=4).fit(policy, datamodule())
    assert policy.updates == 2


def no_signal(said: Any) -> list[str]:
    return [str(one.message) for one in said if "had a signal" in str(one.message)]


class Refusals:
    """A judge to whom everything is a refusal."""

    def classify(self, prompts: Any, completions: Any, **_: Any) -> list[str]:
        return ["refusal"] * len(completions)


def test_rewards_that_are_all_alike_are_warned_of_once_with_rates_and_cures(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=constant, max_rollouts_without_signal=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = trainer(tmp_path, steps=5)
        run.fit(policy, datamodule())
    (alike,) = no_signal(said)
    assert "first 3 rollouts" in alike
    assert "6 groups without spread, mean reward 1, 100.0% of 24 prompts answered, 0.0% refused" in alike
    assert all(cure in alike for cure in ("warmup", "`sampling.temperature`", "`group_size`"))
    assert (policy.updates, run.global_step) == (0, 5)
    assert all(not weight.any() for name, weight in adapter(policy).items() if "lora_B" in name)


def test_a_run_without_a_signal_ends_after_the_stated_number_and_a_resumed_one_counts_on(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=Scripted(even_tokens, nothing_good), max_rollouts_without_signal=4)
    run = trainer(tmp_path, steps=3)
    run.fit(policy, datamodule())
    run.save_checkpoint(tmp_path / "part.ckpt")
    again = module(tiny_llama, reward=nothing_good, max_rollouts_without_signal=4)
    with pytest.raises(NoSignalError, match="4 rollouts in a row.*8 groups.*Cures") as ended:
        trainer(tmp_path, steps=9).fit(again, datamodule(), ckpt_path=tmp_path / "part.ckpt")
    assert again.rollouts == 5
    assert is_users_mistake(ended.value)


def test_a_short_run_that_was_warned_and_learnt_nothing_is_an_error_too(tiny_llama, tmp_path):
    with pytest.warns(UserWarning, match="no signal|had a signal"), pytest.raises(NoSignalError, match="3 rollouts"):
        trainer(tmp_path, steps=3).fit(module(tiny_llama, reward=constant), datamodule())


def test_a_policy_that_is_safe_already_is_no_failure(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=constant, judge=Refusals(), max_rollouts_without_signal=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, steps=6).fit(policy, datamodule())
    (alike,) = no_signal(said)
    assert "safe already" in alike
    assert "100.0% refused" in alike
    assert policy.rollouts == 6


def test_a_first_rollout_with_a_signal_is_not_warned_of(tiny_llama, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, steps=5).fit(module(tiny_llama, reward=Scripted(even_tokens, constant)), datamodule())
    assert not [one for one in said if "had a signal" in str(one.message) or "gave None" in str(one.message)]


def judged(rewards: list[float], outcome: str, finished: bool = True) -> JudgedRows:
    number = len(rewards)
    return JudgedRows(
        lengths=torch.ones(number),
        finished=torch.full((number,), finished),
        prompt_tokens=torch.ones(number // 2),
        rewards=RewardResult(total=torch.tensor(rewards), per_reward={}, metrics={}),
        outcomes=[outcome] * number,
    )


def counted(signal: Signal, *rollouts: JudgedRows, mask_truncated: bool = False) -> Signal:
    for rows in rollouts:
        signal.count(rows, 2, mask_truncated=mask_truncated)
    return signal


def test_only_the_best_reward_of_the_run_is_safe_and_the_worst_is_not():
    learnt, best, worst = judged([0.0, 1.0], "unsafe"), judged([1.0, 1.0], "unsafe"), judged([0.0, 0.0], "unsafe")
    with pytest.warns(UserWarning, match="safe already"):
        counted(Signal(max_without=2), learnt, best, best, best)
    with pytest.raises(NoSignalError):
        counted(Signal(max_without=2), learnt, worst, best)
    with pytest.raises(NoSignalError):
        counted(Signal(max_without=2), judged([0.0, 0.0], "garbage"), judged([0.0, 0.0], "garbage"))


def test_refusals_are_no_safety_where_nobody_reads_harm():
    refused = replace(judged([0.0, 0.0], "refusal"), reads_harm=False)
    with pytest.raises(NoSignalError, match="0.0% of 4 prompts answered, 100.0% refused"):
        counted(Signal(max_without=2), refused, refused)
    best = replace(judged([1.0, 1.0], "answered"), reads_harm=False)
    with pytest.warns(UserWarning, match="reward is the best that the run has seen") as said:
        counted(Signal(max_without=2), judged([0.0, 1.0], "refusal"), best, best)
    assert not [one for one in said if "safe" in str(one.message)]


def test_a_group_whose_spread_is_left_out_has_no_signal_and_the_message_says_so():
    rows = judged([0.0, 1.0], "unsafe", finished=False)
    assert counted(Signal(max_without=2), rows, rows, rows).with_signal == 3
    with pytest.raises(NoSignalError, match="2 groups differ only where `mask_truncated` leaves out"):
        counted(Signal(max_without=2), rows, rows, mask_truncated=True)


def test_updates_are_those_that_were_taken_wherever_they_are_told(tiny_llama, tmp_path, capsys):
    policy = module(tiny_llama, reward=Scripted(even_tokens, constant, even_tokens, constant))
    run = trainer(tmp_path, steps=5, callbacks=[RunReport(str(tmp_path / "out"), evaluate=False)])
    run.fit(policy, datamodule())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert run.global_step == 5, "Lightning counts steps that were skipped"
    steps = {int(state["step"]) for state in run.optimizers[0].state.values()}
    assert steps == {policy.updates} == {2}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["updates"], summary["updates_skipped"]) == (2, 3)
    assert "2 updates (3 more skipped)" in " ".join(capsys.readouterr().out.split())
    content = read_checkpoint(tmp_path / "end.ckpt")
    assert updates_in(content) == 2
    again = module(tiny_llama)
    trainer(tmp_path, steps=7).fit(again, datamodule(), ckpt_path=tmp_path / "end.ckpt")
    assert again.updates == 4


def test_a_run_without_an_update_does_not_claim_one(tiny_llama, tmp_path, capsys):
    policy = module(tiny_llama, reward=constant)
    report = RunReport(str(tmp_path / "out"), evaluate=False)
    with pytest.warns(UserWarning, match="No update was taken"):
        trainer(tmp_path, steps=2, callbacks=[report]).fit(policy, datamodule())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["updates"] == 0
    assert "no update was taken" in " ".join(capsys.readouterr().out.split()).lower()


def test_a_checkpoint_of_before_the_count_has_the_steps_less_the_skipped():
    old = {"global_step": 9, "nspo_lightning": {"counters": {"updates_skipped": 2, "updates_nonfinite": 1}}}
    assert updates_in(old) == 6


def test_what_a_policy_whose_thoughts_are_cut_needs_is_room_and_not_another_judge(tiny_llama, tmp_path):
    policy = module(tiny_llama, reward=nothing, max_unscored_rollouts=2)
    policy.policy_settings.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<think>\n"
    room = r"8 of the 8 completions are thoughts that do not end.*`sampling.max_new_tokens`"
    with pytest.warns(UserWarning, match=rf"rollout 1.*{room}"), pytest.raises(RewardError, match=room) as ended:
        trainer(tmp_path, steps=3).fit(policy, datamodule())
    assert "judge" not in str(ended.value)
    last = module(tiny_llama, reward=nothing)
    last.policy_settings.chat_template = policy.policy_settings.chat_template
    with pytest.warns(UserWarning, match=room), pytest.raises(RewardError, match=f"not one completion.*{room}"):
        trainer(tmp_path, steps=1).fit(last, datamodule())


def test_one_rank_with_a_score_is_enough():
    scores = ScoredRollouts(max_unscored=1)
    scores.count(torch.tensor([float("nan"), 0.0, 1.0, float("nan")]), ("r",), rollout=1)
    assert (scores.rollouts_scored, scores.unscored_in_a_row) == (1, 0)


@pytest.mark.parametrize("value", [0, -1])
def test_the_limit_is_checked(tiny_llama, value):
    with pytest.raises(ValueError, match="`max_unscored_rollouts` must be at least 1"):
        module(tiny_llama, max_unscored_rollouts=value)


def test_a_checkpoint_holds_the_counts_of_scores():
    before = Progress(max_nonfinite=1, scored=ScoredRollouts(max_unscored=9))
    before.scored.count(torch.tensor([0.0, 1.0]), ("r",), rollout=1)
    with pytest.warns(UserWarning, match="gave None"):
        before.scored.count(torch.full((2,), torch.nan), ("r",), rollout=2)
    counted(before.signal, judged([0.0, 1.0], "unsafe"), judged([0.5, 0.5], "refusal"))
    state = before.state_dict(before.snapshot())
    assert {"rollouts_scored": 1, "unscored_in_a_row": 1}.items() <= state["counters"].items()
    again = Progress(max_nonfinite=1)
    again.load_state_dict(state)
    assert again.scored.to_counters() == before.scored.to_counters()
    assert again.signal == before.signal
    assert (again.signal.low, again.signal.high, again.signal.stretch.refused) == (0.0, 1.0, 2)
