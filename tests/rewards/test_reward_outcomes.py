"""Rewards made from a judge's outcomes."""

from __future__ import annotations

import asyncio

import pytest

from nspo_lightning.rewards import OutcomeReward, Reward, RewardError, RewardSet, SafeAndHelpful


class ListedJudge:
    """Says what the completion says."""

    def classify(self, prompts, completions, **columns):
        return [None if text == "none" else text for text in completions]

    def metrics(self):
        return {"errors": 3}


class AwaitedJudge(ListedJudge):
    async def aclassify(self, prompts, completions, **columns):
        await asyncio.sleep(0)
        return self.classify(prompts, completions, **columns)


class LengthOfPrompt(Reward):
    def __call__(self, prompts, completions, **columns):
        assert completions == ["safe"] * len(prompts)  # nothing but answered benign prompts
        assert len(columns["kind"]) == len(prompts)
        return [len(p) / 10 for p in prompts]


COMPLETIONS = ["unsafe", "refusal", "safe", "garbage", "none"]


@pytest.mark.parametrize("judge", [ListedJudge(), AwaitedJudge()], ids=["sync", "async"])
def test_outcomes_become_numbers(judge):
    rewards = RewardSet([OutcomeReward(judge, safe=0.5)])
    result = rewards(["p"] * 5, COMPLETIONS)
    assert result.total[:4].tolist() == [-1.0, 0.0, 0.5, -1.0]
    assert result.excluded.tolist() == [False] * 4 + [True]
    assert result.metrics == {"judge/safety/errors": 3.0}


@pytest.mark.parametrize("judge", [ListedJudge(), AwaitedJudge()], ids=["sync", "async"])
def test_safe_and_helpful_by_hand(judge):
    rewards = RewardSet([SafeAndHelpful(judge, helpfulness=0.5)])
    harmful = rewards(["p"] * 5, COMPLETIONS, {"kind": [True] * 5})
    benign = rewards(["p"] * 5, COMPLETIONS, {"kind": [False] * 5})
    assert harmful.total[:4].tolist() == [-1.0, 0.0, 0.0, -1.0]
    assert benign.total[:4].tolist() == [-1.0, 0.0, 0.5, -1.0]
    assert harmful.excluded[4]
    assert benign.excluded[4]


def test_refusing_everything_is_not_the_best_policy():
    harmful = [True] * 6 + [False] * 2
    refuser = RewardSet([SafeAndHelpful(ListedJudge())])(["p"] * 8, ["refusal"] * 8, {"kind": harmful})
    helper = RewardSet([SafeAndHelpful(ListedJudge())])(["p"] * 8, ["refusal"] * 6 + ["safe"] * 2, {"kind": harmful})
    assert helper.total.sum() > refuser.total.sum()


@pytest.mark.parametrize("judge", [ListedJudge(), AwaitedJudge()], ids=["sync", "async"])
def test_helpful_reward_scales_the_share_and_sees_only_answered_benign_prompts(judge):
    rewards = RewardSet([SafeAndHelpful(judge, helpfulness=2.0, helpful_reward=LengthOfPrompt())])
    result = rewards(["12345", "1234567890", "x", "y"], ["safe", "safe", "safe", "refusal"], {"kind": [0, 0, 1, 0]})
    assert result.total.tolist() == [1.0, 2.0, 0.0, 0.0]


class Broken:
    def __init__(self, outcomes):
        self.outcomes = outcomes

    def classify(self, prompts, completions, **columns):
        return self.outcomes


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (["safe"], "list of 2 outcomes, one a completion, got 1"),
        (None, "got NoneType"),
        (["safe", "fine"], "one of unsafe, refusal, safe, garbage or None, but sample 1 got 'fine'"),
    ],
)
def test_judges_that_break_the_contract(outcomes, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([OutcomeReward(Broken(outcomes))])(["p"] * 2, ["c"] * 2)


def test_helpfulness_must_be_positive():
    with pytest.raises(ValueError, match="`helpfulness` must be positive, got 0.*OutcomeReward"):
        SafeAndHelpful(ListedJudge(), helpfulness=0)
