"""Selection, fronts, spreads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nspo_lightning.compare.selection import SelectionRule, front_at, mean_and_spread

UNIT = st.integers(0, 1000).map(lambda count: count / 1000)  # rates are shares of prompts


def metrics(unsafe: float, accuracy: float) -> dict[str, float]:
    return {"safety/unsafe_rate": unsafe, "general/accuracy": accuracy}


def test_a_safe_able_checkpoint_beats_a_safer_less_able_one() -> None:
    rule = SelectionRule()
    assert rule.preference(metrics(0.05, 0.9)) > rule.preference(metrics(0.0, 0.8))


def test_an_unsafe_checkpoint_never_beats_a_safe_one_and_the_safest_of_the_unsafe_wins() -> None:
    rule = SelectionRule()
    assert rule.preference(metrics(0.051, 1.0)) < rule.preference(metrics(0.05, 0.0))
    assert rule.preference(metrics(0.2, 0.1)) > rule.preference(metrics(0.3, 1.0))


def test_a_metric_of_which_less_is_better_and_one_that_is_missing() -> None:
    rule = SelectionRule(metric="general/nll", higher_is_better=False)
    low, high = ({"safety/unsafe_rate": 0.0, "general/nll": v} for v in (1.0, 2.0))
    assert rule.preference(low) > rule.preference(high) > rule.preference({"safety/unsafe_rate": 0.0})
    assert rule.preference(high) > rule.preference({"safety/unsafe_rate": 0.0, "general/nll": math.nan})


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=12), UNIT)
def test_the_front_is_the_best_of_the_safe_enough_and_never_falls(
    points: list[tuple[float, float]], level: float
) -> None:
    reached = [ability for unsafe, ability in points if unsafe <= level]
    assert front_at(points, level) == (max(reached) if reached else -math.inf)
    for unsafe, ability in points:
        assert front_at(points, unsafe) >= ability
    for low, high in itertools.pairwise(sorted(unsafe for unsafe, _ in points)):
        assert front_at(points, low) <= front_at(points, high)


def test_spread_is_the_bessel_corrected_deviation() -> None:
    mean, spread = mean_and_spread([1.0, 3.0])
    assert mean == 2.0
    assert spread == pytest.approx(math.sqrt(2))
    assert mean_and_spread([1.5])[0] == 1.5
    assert math.isnan(mean_and_spread([1.5])[1])  # one seed has no spread, not one of 0
    assert math.isnan(mean_and_spread([])[0])


def test_a_rate_in_float32_at_the_limit_is_within_it() -> None:
    five_of_100 = float(torch.tensor(0.05))  # as Lightning logs it
    assert five_of_100 > 0.05
    rule = SelectionRule()
    assert rule.preference(metrics(five_of_100, 0.9)) > rule.preference(metrics(0.0, 0.8))
    assert front_at([(five_of_100, 0.9)], 0.05) == 0.9
    assert front_at([(0.0501, 0.9)], 0.05) == -math.inf


def test_a_checkpoint_whose_unsafe_rate_is_no_number_never_wins() -> None:
    rule = SelectionRule()
    unknown, unsafe = metrics(math.nan, 1.0), metrics(0.9, 0.1)
    assert rule.preference(unsafe) > rule.preference(unknown)
    assert not rule.preference(unknown) > rule.preference(unsafe)
