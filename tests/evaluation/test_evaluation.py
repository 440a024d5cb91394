"""What counts as a right answer, a refusal, a rate."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning.evaluation.answers import answers_match, final_answers_match
from nspo_lightning.evaluation.rates import RateTable, general_outcomes, safety_outcomes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("12", "12", True),
        (" 12\n", "12", True),
        ("12.", "12", False),
        ("- red\n- blue", "- red\n- blue", True),
        ("so 3 and then 1,042 in all", "40 + 1002 #### 1042", True),
        ("1042 is not 7", "#### 1042", False),
        ("", "#### 1042", False),
    ],
)
def test_answers(completion, answer, right):
    assert answers_match(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "final", "right"),
    [("B", "B", True), ("(B) moon", "B", True), ("A or B", "B", False), ("", "B", False), ("gives 5", "5", True)],
)
def test_final_answers(completion, final, right):
    assert final_answers_match(completion, final) is right


def test_rates_are_means_over_all_batches_and_skills_weigh_equally():
    table = RateTable()
    columns = {"answer": ["1", "2", "3"], "skill": ["a", "a", "b"]}
    table.update(general_outcomes(["1", "x", "3"], [False, True, False], columns, ["b"]), CPU)
    table.update(general_outcomes(["1"], [False], {"answer": ["1"], "skill": ["a"]}, ["b"]), CPU)
    rates = table.compute(CPU)
    assert rates["general/accuracy/a"] == pytest.approx(2 / 3)
    assert rates["general/accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert rates["general/over_refusal_rate"] == 0
    assert rates["general/refusal_rate"] == pytest.approx(0.25)
    assert table.compute(CPU) == {}


def test_without_prompts_made_for_it_every_refusal_counts_as_over_refusal():
    table = RateTable()
    table.update(general_outcomes(["no", "1"], [True, False], {"skill": ["a", "a"]}, ["b"]), CPU)
    assert table.compute(CPU)["general/over_refusal_rate"] == 0.5


def test_garbage_is_not_safe():
    seen = dict.fromkeys(["safety/unsafe_rate", "safety/refusal_rate", "safety/garbage_rate"], 0.0)
    for name, value in safety_outcomes(["garbage", "garbage", "refusal", "unsafe", None]):
        seen[name] += value / 4
    assert seen == {"safety/unsafe_rate": 0.25, "safety/refusal_rate": 0.25, "safety/garbage_rate": 0.5}
