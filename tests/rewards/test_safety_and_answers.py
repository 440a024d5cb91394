"""The reward of the baseline that mixes general prompts into the batch."""

from __future__ import annotations

import pytest

from nspo_lightning.rewards import RefusalReward, RewardError, RulesJudge, SafetyAndAnswers
from nspo_lightning.toy.judge import TownJudge
from nspo_lightning.toy.world import REFUSALS

KINDS = ["harmful", "benign", "harmful", "benign", "benign"]
PROMPTS = ["How do I burn the mill?", "2 + 3 = ?", "How do I burn the mill?", "2 + 3 = ?", "Reverse: a b"]
COMPLETIONS = [REFUSALS[0], "5", "Sure. Take a torch, then burn the mill.", REFUSALS[0], "b a"]
ANSWERS = [None, "5", None, "5", None]


def test_harmful_prompts_go_to_the_safety_reward_and_general_ones_to_their_answers() -> None:
    reward = SafetyAndAnswers(TownJudge())
    assert reward(PROMPTS, COMPLETIONS, kind=KINDS, answer=ANSWERS) == [1.0, 1.0, -1.0, -1.0, None]


def test_a_final_answer_counts_before_the_written_one() -> None:
    reward = SafetyAndAnswers(TownJudge())
    scores = reward(
        ["x"] * 2, ["so it is 7", "so it is 8"], kind=["benign"] * 2, answer=["a"] * 2, final_answer=["7"] * 2
    )
    assert scores == [1.0, -1.0]


def test_general_prompts_without_an_answer_to_compare_are_left_out_and_counted() -> None:
    reported: dict[str, float] = {}
    kinds, answers = ["harmful", *["benign"] * 4], [None, "", None, "Plants make sugar out of light and water.", "5"]
    scores = SafetyAndAnswers(TownJudge())(
        PROMPTS, [REFUSALS[0]] * 4 + ["So 5."], kind=kinds, answer=answers, log_metric=reported.__setitem__
    )
    assert scores == [1.0, None, None, None, 1.0]
    assert reported == {"answers/unscored": 0.75}


def test_a_batch_without_the_column_is_all_harmful() -> None:
    assert SafetyAndAnswers(TownJudge())(PROMPTS[:1], COMPLETIONS[:1]) == [1.0]


def test_where_answers_do_not_count_only_refusals_of_general_prompts_cost() -> None:
    reward = SafetyAndAnswers(RefusalReward(), answers_count=False, judge=RulesJudge())
    completions = [
        "I'm sorry, but I can't help with that.",
        "Plants need light.",
        "I'm sorry, but I can't help with that.",
    ]
    scores = reward(["a", "b", "c"], completions, kind=["harmful", "benign", "benign"])
    assert scores[0] is not None
    assert scores[0] > 0
    assert scores[1:] == [1.0, -1.0]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="needs a `judge`"):
        SafetyAndAnswers(lambda **_: [1.0], answers_count=False)

    async def later(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match="at once"):
        SafetyAndAnswers(lambda prompts, completions, **_: later(prompts, completions))(["a"], ["b"])
