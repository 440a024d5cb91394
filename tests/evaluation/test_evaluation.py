"""What counts as a right answer, a refusal, a rate."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning.evaluation.answers import is_right
from nspo_lightning.evaluation.rates import RateTable, general_outcomes, safety_outcomes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("12", "12", True),
        (" 12\n", "12", True),
        ("12.", "12", True),
        ("- red\n- blue", "- red\n- blue", True),
        ("red blue", "- red\n- blue", False),
        ("so 3 and then 1,042 in all", "40 + 1002 #### 1042", True),
        ("1042 is not 7", "#### 1042", False),
        ("#### 1042\n\nIs there more, as 7?", "1042", True),
        ("\\boxed{\\frac{1}{2}} of 3", "0.5", True),
        ("", "#### 1042", False),
    ],
)
def test_answers(completion, answer, right):
    assert is_right(completion, None, answer.rsplit("####", 1)[-1]) is right
    if "\n" not in answer:
        assert is_right(completion, answer, None) is right


@pytest.mark.parametrize(
    ("completion", "final", "right"),
    [
        ("B", "B", True),
        ("(B) moon", "B", True),
        ("A or B", "B", False),
        ("", "B", False),
        ("gives 5", "5", True),
        ("**paris**", "Paris", True),
        ("Parish", "Paris", False),
        ("I think the answer is (B).", "B", True),
        ("The answer is not B", "B", False),
        ("So 42.", "6 * 7 = 42 #### 42", True),  # GSM8K's answer as it is, in verl's `ground_truth` or the column
        ("So 41.", "6 * 7 = 42 #### 42", False),
    ],
)
def test_final_answers(completion, final, right):
    assert is_right(completion, "because " * 20, final) is right


@pytest.mark.parametrize(
    ("answer", "final"),
    [("", None), (None, None), (" ", None), ("Plants make sugar out of light, water and air.", None), ("Paris", "")],
)
def test_what_cannot_be_compared_is_not_scored(answer, final):
    assert is_right("Plants make sugar out of light, water and air.", answer, final) is None
    seen = general_outcomes(["x"], [False], {"answer": [answer], "final_answer": [final], "skill": ["s"]}, [])
    assert ("general/unscored/s", 1.0) in seen
    assert not any(name.startswith("general/accuracy") for name, _ in seen)


def test_a_mean_is_over_what_can_be_scored_and_the_rest_is_counted_and_named():
    table, columns = RateTable(), {"answer": ["1", "2", "", ""], "skill": ["a", "a", "a", "ifeval"]}
    table.update(general_outcomes(["1", "2", "3", "4"], [False] * 4, columns, []), CPU)
    rates = table.compute(CPU)
    assert rates["general/accuracy"] == rates["general/accuracy/a"] == 1.0
    assert rates["general/unscored/a"] == pytest.approx(1 / 3)
    assert rates["general/unscored/ifeval"] == 1.0
    assert "general/accuracy/ifeval" not in rates
    table.update(general_outcomes(["1"], [False], {"answer": ["1"], "skill": ["a"]}, []), CPU)
    assert not any("unscored" in name for name in table.compute(CPU))


def test_rates_are_means_over_all_batches_and_skills_weigh_equally():
    table = RateTable()
    columns = {"answer": ["1", "2", "3"], "skill": ["a", "a", "b"]}
    table.update(general_outcomes(["1", "x", "3"], [False, True, False], columns, ["b"]), CPU)
    table.update(general_outcomes(["1"], [False], {"answer": ["1"], "skill": ["a"]}, ["b"]), CPU)
    rates = table.compute(CPU)
    assert rates["general/accuracy/a"] == pytest.approx(2 / 3)
    assert rates["general/accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert rates["general/over_refusal_rate"] == 0
    assert rates["general/refusal_rate"] == rates["general/refusal_rate/a"] == pytest.approx(1 / 3), "ordinary prompts"
    assert "general/refusal_rate/b" not in rates
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
