"""The parts of a module by themselves: windows and counts, what is chosen of an experience, whose judge is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nspo_lightning.grpo import Normaliser, Rollout, rows_with_signal
from nspo_lightning.module.experience import Experience, ExperienceBuffer, Minibatch
from nspo_lightning.module.finite import NonFiniteError
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.judging import JudgedRollout, name_outcomes
from nspo_lightning.module.progress import Progress
from nspo_lightning.module.update_window import UpdateWindow
from nspo_lightning.rewards import OutcomeReward, RewardResult, RewardSet, RulesJudge
from nspo_lightning.rewards.rules.refusal import reads_harm


def counts(tokens: float) -> Normaliser:
    return Normaliser(num_rows=2.0, num_tokens=tokens, max_new_tokens=8)


def experience(advantages: list[float], group_size: int = 2, tokens: int = 3) -> Experience:
    rows = len(advantages)
    prompts = rows // group_size
    rollout = Rollout(
        prompt_ids=torch.arange(prompts * 2).view(prompts, 2),
        prompt_mask=torch.ones(prompts, 2, dtype=torch.bool),
        group_size=group_size,
        completion_ids=torch.arange(rows * tokens).view(rows, tokens),
        completion_mask=torch.ones(rows, tokens, dtype=torch.bool),
        finished=torch.ones(rows, dtype=torch.bool),
    )
    return Experience(rollout=rollout, advantages=torch.tensor(advantages))


def test_dapo_divides_by_the_tokens_of_the_window():
    window = UpdateWindow()
    divisors = [window.add(counts(tokens), tokens, "dapo").num_tokens for tokens in (10.0, 30.0, 0.0)]
    assert divisors == [10.0, 10.0, 10.0]
    # Gradients g / 10 each, over 3 batches by Lightning; wanted: their sum over 40 tokens.
    assert window.correction(3) / (3 * 10.0) == pytest.approx(1 / 40.0)
    assert UpdateWindow(weights=[5.0]).correction(1) == 1.0
    assert UpdateWindow(weights=[10.0, 30.0]).own_scale == 1 / 3  # the loss that is shown is the batch's own mean
    assert UpdateWindow(weights=[10.0, 0.0]).own_scale == UpdateWindow(weights=[7.0]).own_scale == 1.0


def test_bnpo_divides_by_each_batch_and_by_the_batches_that_came():
    window = UpdateWindow()
    assert [window.add(counts(tokens), 1.0, "bnpo").num_tokens for tokens in (10.0, 30.0)] == [10.0, 30.0]
    assert window.correction(2) == 1.0
    assert window.correction(4) == 2.0  # the last window of an epoch, of two batches


def test_a_window_goes_through_a_checkpoint():
    window = UpdateWindow(has_signal=True, weights=[1.0, 2.0], nonfinite="loss")
    state = window.to_counters()
    assert state == {"_window_has_signal": True, "_window_weights": [1.0, 2.0], "_window_nonfinite": "loss"}
    window.weights.append(3.0)
    assert UpdateWindow.from_counters(state) == UpdateWindow(has_signal=True, weights=[1.0, 2.0], nonfinite="loss")
    assert UpdateWindow.from_counters({}) == UpdateWindow()


def test_closing_a_window_looks_at_gradients_only_where_there_is_something_to_learn():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.nan, 0.0])
    progress = Progress(max_nonfinite=2)
    assert progress.close_window([weight], look=True).nonfinite == ""
    progress.window.has_signal = True
    assert progress.close_window([weight], look=False).nonfinite == ""
    progress.window.has_signal = True
    assert "gradient" in progress.close_window([weight], look=True).nonfinite
    assert progress.window == UpdateWindow()


def test_a_run_gives_up_after_so_many_in_a_row():
    progress = Progress(max_nonfinite=2)
    with pytest.warns(UserWarning, match="Update 4 is skipped: loss"):
        progress.skip_nonfinite("loss", 4)
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        progress.skip_nonfinite("loss", 5)
    assert progress.updates_nonfinite == 2


def test_a_snapshot_is_of_before_and_comes_back():
    progress = Progress(max_nonfinite=2, seed=5, rollouts=3)
    buffer = ExperienceBuffer(experience([1.0, -1.0, 2.0, -2.0]), num_minibatches=2, num_iterations=1)
    progress.open_rollouts.put(7, buffer, at_most=2)
    snapshot = progress.snapshot()
    buffer.next()
    progress.rollouts, progress.window.has_signal = 4, True
    state = progress.state_dict(snapshot)
    again = Progress(max_nonfinite=2)
    again.load_state_dict(state)
    again.load_rollouts(torch.device("cpu"))
    assert (again.seed, again.rollouts, again.window) == (5, 3, UpdateWindow())
    assert again.noise_seed == 5 * 1_000_003 + 3
    assert again.open_rollouts.get(None) is None
    kept = again.open_rollouts.get(7)
    assert kept is not None
    assert kept.step == 0
    assert kept.next().advantages.tolist() == [1.0, -1.0]
    assert progress.state_dict(None)["counters"]["rollouts"] == 4


def test_an_empty_buffer_is_not_kept():
    progress = Progress(max_nonfinite=1)
    buffer = ExperienceBuffer(experience([1.0, -1.0]), 1, 1)
    progress.open_rollouts.put(None, buffer, at_most=1)
    buffer.next()
    assert progress.open_rollouts.get(None) is None
    assert progress.state_dict(None)["buffers"] == [[]]


def test_a_rollout_of_an_earlier_checkpoint_goes_on():
    buffer = ExperienceBuffer(experience([1.0, -1.0]), 1, 2)
    buffer.next()
    progress = Progress(max_nonfinite=1)
    progress.load_state_dict({"seed": 1, "counters": {}, "buffers": [buffer.state_dict()]})
    progress.load_rollouts(torch.device("cpu"))
    kept = progress.open_rollouts.get(None)
    assert kept is not None
    assert kept.step == 1
    progress.load_state_dict({"seed": 1, "counters": {}, "buffers": [None]})
    progress.load_rollouts(torch.device("cpu"))
    assert progress.open_rollouts.get(None) is None


def test_rollouts_that_were_left_behind_go():
    progress = Progress(max_nonfinite=1)
    for number in range(5):
        progress.open_rollouts.put(number, ExperienceBuffer(experience([1.0, -1.0]), 1, 2), at_most=2)
    assert [number for number in range(5) if progress.open_rollouts.get(number)] == [3, 4]


def test_a_part_without_prompts_is_handed_out_too():
    buffer = ExperienceBuffer(experience([1.0, -1.0, 2.0, -2.0]), num_minibatches=3, num_iterations=2)
    parts = [buffer.next().advantages.tolist() for _ in range(6)]
    assert parts == [[], [1.0, -1.0], [2.0, -2.0]] * 2
    assert buffer.is_empty


def test_groups_without_signal_are_left_out_and_one_at_least_stays():
    whole = experience([0.0, 0.0, 1.0, -1.0])
    mask = whole.rollout.completion_mask
    chosen = Minibatch.of(whole, mask, rows_with_signal(whole.advantages, mask, has_kl=False))
    assert chosen.rows.tolist() == [False, False, True, True]
    assert chosen.experience.rollout.prompt_ids.tolist() == [[2, 3]]
    assert bool(chosen.mask.all())
    nothing = experience([0.0, 0.0, 0.0, 0.0])
    without = rows_with_signal(nothing.advantages, mask, has_kl=False)
    assert not bool(without.any())
    one = Minibatch.of(nothing, mask, without)
    assert one.rows.tolist() == [True, True, False, False]
    assert not bool(one.mask.any())
    assert bool(Minibatch.of(nothing, mask, rows_with_signal(nothing.advantages, mask, has_kl=True)).rows.all())


@pytest.mark.parametrize("has_kl", [False, True])
def test_a_group_whose_completions_are_all_masked_has_no_signal(has_kl):
    whole = experience([1.0, -1.0, 1.0, -1.0])
    mask = whole.rollout.completion_mask.clone()
    mask[:2] = False
    chosen = Minibatch.of(whole, mask, rows_with_signal(whole.advantages, mask, has_kl=has_kl))
    assert chosen.rows.tolist() == [False, False, True, True]


@pytest.mark.parametrize(("minibatches", "iterations", "wants"), [(1, 1, False), (1, 2, True), (2, 2, False)])
def test_an_on_policy_pass_leaves_its_log_probs_for_later_ones(minibatches, iterations, wants):
    buffer = ExperienceBuffer(experience([1.0, -1.0, 2.0, -2.0]), minibatches, iterations)
    assert buffer.wants_log_probs == wants
    buffer.next()
    buffer.keep_old_log_probs(torch.ones(2, 3), torch.tensor([False, False, True, True]))
    assert not buffer.wants_log_probs
    old = buffer.experience.old_log_probs
    assert old is not None
    assert old.sum(1).tolist() == [0.0, 0.0, 3.0, 3.0]


def length(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_the_judge_is_that_of_the_first_reward_that_has_one():
    judge = RulesJudge()
    assert GRPOModule(RewardSet({"length": length, "safety": OutcomeReward(judge)})).judge is judge
    assert GRPOModule(OutcomeReward(judge)).evaluator.judging.judge is judge
    assert not reads_harm(GRPOModule(length).judge)
    assert reads_harm(judge)
    other = RulesJudge()
    assert GRPOModule(OutcomeReward(judge), judge=other).judge is other


def test_outcomes_of_the_reward_stand():
    result = RewardResult(total=torch.zeros(1), per_reward={}, outcomes=["garbage"])
    assert name_outcomes(result, RulesJudge(), ["p"], ["I'm sorry, I can't help with that."], {}) == ["garbage"]
    asked = replace(result, outcomes=None)
    assert name_outcomes(asked, RulesJudge(), ["p"], ["I'm sorry, I can't help with that."], {}) == ["refusal"]


def test_rows_of_a_judged_rollout_have_the_columns_that_rewards_reported():
    result = RewardResult(
        total=torch.tensor([1.0, 0.5]), per_reward={}, extra={"safety/outcome": ["safe", None], "odd": [1]}
    )
    judged = JudgedRollout(prompts=["p", "p"], completions=["a", "b"], result=result, outcomes=["safe", None])
    assert judged.rows()[1] == {
        "prompt": "p",
        "completion": "b",
        "reward": 0.5,
        "outcome": None,
        "safety/outcome": None,
    }
