"""Rewards made from a judge's outcomes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nspo_lightning.rewards import (
    FunctionReward,
    Judge,
    OutcomeReward,
    Reward,
    RewardError,
    RewardSet,
    SafeAndHelpful,
    SafetyAndAnswers,
    judge_in,
)


class ListedJudge(Judge):
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


class Broken:  # a judge by its method alone
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
    judge: Any = Broken(outcomes)
    with pytest.raises(RewardError, match=message):
        RewardSet([OutcomeReward(judge)])(["p"] * 2, ["c"] * 2)


def test_helpfulness_must_be_positive():
    with pytest.raises(ValueError, match="`helpfulness` must be positive, got 0.*OutcomeReward"):
        SafeAndHelpful(ListedJudge(), helpfulness=0)


@pytest.mark.parametrize("judge", [ListedJudge(), AwaitedJudge()], ids=["sync", "async"])
@pytest.mark.parametrize("reward", [OutcomeReward, SafeAndHelpful])
def test_a_set_hands_out_what_the_judge_in_it_said(judge: Any, reward: Any) -> None:
    def plain(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    result = RewardSet([plain, reward(judge, name="safety")])(["p"] * 5, COMPLETIONS)
    assert result.outcomes == ["unsafe", "refusal", "safe", "garbage", None]
    assert result.extra["safety/outcome"] == result.outcomes
    assert RewardSet([plain])(["p"] * 5, COMPLETIONS).outcomes is None


def test_a_column_that_is_only_called_outcome_is_not_taken_for_a_judges() -> None:
    def own(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("own/outcome", ["won", "lost"])
        return [1.0, 0.0]

    alone = RewardSet([own])(["p"] * 2, ["safe", "refusal"])
    assert alone.outcomes is None
    assert alone.extra == {"own/outcome": ["won", "lost"]}
    beside = RewardSet([own, OutcomeReward(ListedJudge())])(["p"] * 2, ["safe", "refusal"])
    assert beside.outcomes == ["safe", "refusal"]


def test_a_subclass_with_a_call_of_its_own_is_called() -> None:
    class Doubled(OutcomeReward):
        def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
            scores: Any = super().__call__(prompts, completions, **columns)
            return [2 * score for score in scores]

    assert RewardSet([Doubled(ListedJudge())])(["p"], ["unsafe"]).total.tolist() == [-2.0]


@pytest.mark.parametrize("judge", [ListedJudge(), Broken([])], ids=["by its class", "by its method"])
def test_the_judge_in_a_reward_or_a_set_is_found(judge: Judge) -> None:
    assert judge_in(OutcomeReward(judge)) is judge
    assert judge_in(RewardSet([LengthOfPrompt(), SafeAndHelpful(judge)])) is judge
    assert judge_in(RewardSet([LengthOfPrompt()])) is None
    assert judge_in(judge) is judge


def test_what_wants_to_be_prepared_is_prepared_once() -> None:
    class Prepared(ListedJudge):
        times = 0

        def prepare(self) -> None:
            self.times += 1

    class HelpfulScore(LengthOfPrompt):
        times = 0

        def prepare(self) -> None:
            self.times += 1

    judge, helpful = Prepared(), HelpfulScore()
    RewardSet([SafeAndHelpful(judge, helpful_reward=helpful), LengthOfPrompt()]).prepare()
    assert (judge.times, helpful.times) == (1, 1)


def test_a_class_named_by_its_path_alone_hands_out_its_outcomes_too() -> None:
    judge = ListedJudge()
    named = FunctionReward("nspo_lightning.rewards.OutcomeReward", kwargs={"judge": judge})
    rewards = RewardSet([named])
    assert rewards(["p"] * 2, ["safe", "unsafe"]).outcomes == ["safe", "unsafe"]
    assert judge_in(rewards) is judge
    assert rewards.metrics() == {"judge/safety/errors": 3.0}


def test_a_reward_that_has_some_rows_judged_hands_out_no_outcomes() -> None:
    rewards = RewardSet([SafetyAndAnswers(OutcomeReward(ListedJudge()))])
    result = rewards(["p"] * 2, ["unsafe", "4"], {"kind": ["harmful", "benign"], "answer": [None, "4"]})
    assert result.total.tolist() == [-1.0, 1.0]
    assert result.outcomes is None


def test_an_object_that_says_it_is_async_is_awaited_beside_the_others() -> None:
    class Waits:
        is_async = True

        def __call__(self, completions: list[str], **columns: Any) -> Any:
            return self._later(completions)

        async def _later(self, completions: list[str]) -> list[float]:
            return [1.0] * len(completions)

    waits: Any = Waits()
    assert RewardSet([waits])(["p"], ["c"]).total.tolist() == [1.0]
    helpful = SafeAndHelpful(ListedJudge(), helpful_reward=waits)
    assert RewardSet([helpful])(["p"], ["safe"], {"kind": ["benign"]}).total.tolist() == [0.5]
