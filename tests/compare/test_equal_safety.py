"""Cuts at equal safety, differences seed by seed, and the bootstrap over seeds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compared_runs import finished_run

from nspo_lightning.compare.equal_safety import (
    Reached,
    cut_at,
    paired_difference,
    paired_seeds,
    reached,
    resamples,
    shares_of_best,
)
from nspo_lightning.compare.law import fit_law, points
from nspo_lightning.compare.plan import RunSpec
from nspo_lightning.compare.results import RunResult
from nspo_lightning.compare.sections import NEAREST


def run(method: str, seed: int, rate: float, *points: tuple[float, float]) -> RunResult:
    trajectory = [
        {"safety/unsafe_rate": unsafe, "general/kl": kl, "steps": 5.0 * i} for i, (unsafe, kl) in enumerate(points)
    ]
    return finished_run(RunSpec(method=method, seed=seed, learning_rate=rate), trajectory)


def value(point) -> float:
    return -float(point["general/kl"])


SLOW = [run("a", seed, 0.1, (0.5, 0.0), (0.08, 0.02 + 0.01 * seed), (0.01, 0.05)) for seed in (0, 1)]
FAST = [run("a", 0, 0.2, (0.02, 0.01)), run("a", 1, 0.2, (0.3, 0.01))]  # one seed never gets there
OTHER = [run("b", seed, 0.1, (0.09, 0.04), (0.04, 0.03)) for seed in (0, 1)]


def test_a_cut_is_the_best_checkpoint_that_is_safe_enough_at_a_rate_that_every_seed_gets_there_with() -> None:
    cut = cut_at(SLOW + FAST, value, 0.1)
    assert cut is not None
    assert cut.learning_rate == 0.1
    assert [cut.checkpoints[s]["general/kl"] for s in (0, 1)] == [0.02, 0.03]
    assert cut.mean("steps") == 5.0
    assert math.isnan(cut.mean("general/nll"))
    strict = cut_at(SLOW + FAST, value, 0.01)
    assert strict is not None
    assert strict.mean("general/kl") == 0.05
    assert cut_at(SLOW + FAST, value, 0.001) is None


def test_differences_are_taken_seed_by_seed() -> None:
    ours, theirs = cut_at(SLOW, value, 0.1), cut_at(OTHER, value, 0.1)
    assert ours is not None
    assert theirs is not None
    mean, spread = paired_difference(ours, theirs, "general/kl")
    assert mean == pytest.approx(-0.005)
    assert spread == pytest.approx(0.01 / math.sqrt(2))


def test_the_bootstrap_draws_the_same_seeds_for_all_and_chooses_the_rate_anew() -> None:
    level = {"a": reached(SLOW + FAST, value, 0.1), "b": reached(OTHER, value, 0.1)}
    # Of (0, 0), (0, 1), (1, 0), (1, 1): a has 0.01 (the fast rate), 0.025, 0.025 and 0.03; b has 0.03 always.
    assert shares_of_best([level]) == {"a": 1.0, "b": 0.25}
    lower = {"a": reached(SLOW + FAST, value, 0.01), "b": reached(OTHER, value, 0.04)}
    assert shares_of_best([level, lower]) == {"a": 1.0, "b": 1.0}
    nowhere = {"a": reached(SLOW, value, 0.0), "b": reached(OTHER, value, 0.0)}
    assert shares_of_best([nowhere]) == {"a": 0.0, "b": 0.0}


def test_a_method_with_fewer_seeds_takes_no_seed_of_the_others_away() -> None:
    level: dict[str, Reached] = {
        "a": {0.1: {0: -1.0, 1: -2.0, 2: -2.0}, 0.2: {0: 9.0}},  # the second rate was tried at one seed
        "b": {0.1: {0: -2.0, 1: -1.0, 2: -1.9}},
        "c": {0.1: {0: 5.0}},
        "d": {0.1: {0: 5.0, 2: 5.0}},
    }
    assert paired_seeds([level]) == [0, 1, 2]
    draws = list(itertools.product((0, 1, 2), repeat=3))
    a, b = ([sum(level[name][0.1][seed] for seed in draw) for draw in draws] for name in "ab")
    expected = {
        "a": sum(x >= y for x, y in zip(a, b, strict=True)) / 27,
        "b": sum(y >= x for x, y in zip(a, b, strict=True)) / 27,
    }
    assert shares_of_best([level]) == pytest.approx(expected)
    assert paired_seeds([{"a": {0.1: {0: 1.0, 1: 1.0, 2: 1.0}}, "b": {0.1: {1: 1.0, 2: 1.0, 3: 1.0}}}]) == [1, 2]
    assert paired_seeds([{"a": {0.1: {0: 1.0, 1: 1.0}}}]) == [0, 1]
    assert shares_of_best([{"a": {0.1: {0: 1.0}}, "b": {0.1: {1: 1.0}}}]) == {}


def test_a_checkpoint_without_a_kl_that_is_a_number_is_not_the_nearest() -> None:
    broken = run("a", 0, 0.1, (0.0, math.nan), (0.01, 0.02), (0.0, math.inf))
    cut = cut_at([broken], NEAREST.ability, 0.1)
    assert cut is not None
    assert cut.mean("general/kl") == 0.02
    only = reached([run("a", 0, 0.1, (0.0, math.nan))], NEAREST.ability, 0.1)
    assert shares_of_best([{"a": only, "b": reached([broken], NEAREST.ability, 0.1)}]) == {"a": 0.0, "b": 1.0}
    assert cut_at([run("a", 0, 0.1, (0.0, math.nan))], NEAREST.ability, 0.1) is None


def test_a_cut_takes_a_rate_in_float32_that_is_exactly_there() -> None:
    ten_of_100 = float(torch.tensor(0.1))
    assert ten_of_100 > 0.1
    assert cut_at([run("a", 0, 0.1, (ten_of_100, 0.02))], value, 0.1) is not None
    assert reached([run("a", 0, 0.1, (ten_of_100, 0.02))], value, 0.1) == {0.1: {0: -0.02}}


def test_without_a_trained_method_there_is_no_best() -> None:
    assert shares_of_best([]) == shares_of_best([{}]) == {}


def test_few_seeds_are_resampled_in_all_ways_and_many_at_random_but_alike() -> None:
    assert len(set(resamples([0, 1, 2]))) == 27
    many = list(resamples(range(10)))
    assert len(many) == 2000
    assert many == list(resamples(range(10)))
    assert list(resamples([])) == []


def test_a_method_below_the_common_curve_is_said_to_be_and_by_how_much() -> None:
    common = {"a": [(x, 3 * x**1.5) for x in (0.5, 1.0, 4.0)], "b": [(2.0, 3 * 2**1.5)]}
    law = fit_law(common, {"ours": [(x, 0.3 * x**1.5) for x in (1.0, 9.0)], "unmoved": []})
    assert law is not None
    assert law.slope == pytest.approx(1.5)
    assert law.explained == pytest.approx(1.0)
    assert law.factors == pytest.approx({"a": 1.0, "b": 1.0, "ours": 0.1})
    assert fit_law({"a": [(1.0, 2.0)]}, {}) is None


def test_checkpoints_that_have_not_moved_or_without_bounds_are_on_no_line() -> None:
    runs = [run("a", 0, 0.1, (0.5, 0.0), (0.1, 0.02), (0.2, math.nan), (0.3, math.inf))]
    assert points(runs, "safety/unsafe_rate", "general/kl") == [(0.1, 0.02)]
