"""Means of general text over tokens and skills, and their intervals."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from nspo_lightning.evaluation.text_means import text_means
from nspo_lightning.policy.divergence import RowScore, TextScores


def rows(skill, count, rng):
    made = []
    for _ in range(count):
        tokens = rng.randint(2, 60)
        kl = rng.expovariate(1 / (0.02 * tokens))
        nll = tokens * rng.gauss(2, 0.3)
        made.append(
            RowScore(
                skill=skill, tokens=tokens, nll=nll, base_nll=nll - 0.5 * kl, kl=kl, first_tokens=2, first_kl=kl / 2
            )
        )
    return made


def ratio(some, part):
    return sum(part(row)[0] for row in some) / sum(part(row)[1] for row in some)


def test_means_weigh_tokens_within_a_skill_and_skills_alike():
    rng = random.Random(0)
    a, b = rows("a", 40, rng), rows("b", 10, rng)
    means = text_means(TextScores((*a, *b)))
    parts = {
        "general/kl": lambda row: (row.kl, row.tokens),
        "general/kl_first": lambda row: (row.first_kl, row.first_tokens),
        "general/nll": lambda row: (row.nll, row.tokens),
        "general/nll_change": lambda row: (row.nll - row.base_nll, row.tokens),
    }
    assert set(means) == {*parts, *(f"{name}/{skill}" for name in parts for skill in "ab")}
    for name, part in parts.items():
        assert means[f"{name}/a"].value == pytest.approx(ratio(a, part))
        assert means[name].value == pytest.approx((ratio(a, part) + ratio(b, part)) / 2)
        assert (means[name].rows, means[f"{name}/b"].rows) == (50, 10)
    mixed = [*a, *b]
    rng.shuffle(mixed)
    assert text_means(TextScores(tuple(mixed))) == means, "to the bit, whichever rank had which rows"


def test_intervals_are_those_of_a_bootstrap_over_rows():
    rng = random.Random(1)
    a, b = rows("a", 60, rng), rows("b", 90, rng)
    means = text_means(TextScores((*a, *b)))

    def drawn(name):
        values = []
        for _ in range(1000):
            some = TextScores((*rng.choices(a, k=len(a)), *rng.choices(b, k=len(b))))
            values.append(fmean(ratio([r for r in some.rows if r.skill == skill], PARTS[name]) for skill in "ab"))
        return values

    for name, mean in ((name, means[name]) for name in PARTS):
        values = drawn(name)
        assert mean.error == pytest.approx(stdev(values), rel=0.1)
        assert mean.interval is not None
        low, high = mean.interval
        assert (mean.value - low) == pytest.approx(1.96 * mean.error, rel=1e-3)
        assert low < fmean(values) < high
        assert mean.as_dict()["interval_95"] == [low, high]


PARTS = {
    "general/kl": lambda row: (row.kl, row.tokens),
    "general/nll_change": lambda row: (row.nll - row.base_nll, row.tokens),
}


def test_what_is_not_known_is_left_out():
    alone = RowScore(tokens=4, nll=8.0, base_nll=math.nan, kl=math.nan, first_tokens=3, first_kl=math.nan)
    means = text_means(TextScores((alone,)))
    assert set(means) == {"general/nll", "general/nll/general"}, "no base, no KL"
    assert means["general/nll"].interval is None, "one row says nothing about others"
    one = RowScore(tokens=40, nll=8.0, base_nll=8.0, kl=0.0)
    two = RowScore(tokens=40, nll=8.0, base_nll=8.0, kl=9.0)
    found = text_means(TextScores((one, two)))
    assert "general/kl_first" not in found, "no prompts"
    assert found["general/kl"].interval is not None
    assert found["general/kl"].interval[0] == 0, "a KL is never below 0"
    assert text_means(TextScores()) == {}


def test_a_row_on_which_the_policy_is_no_number_is_not_left_out_of_the_mean():
    fine = RowScore(tokens=4, nll=8.0, base_nll=8.0, kl=0.01, first_tokens=3, first_kl=0.01)
    broken = RowScore(tokens=4, nll=math.nan, base_nll=8.0, kl=math.nan, first_tokens=3, first_kl=math.nan)
    means = text_means(TextScores((fine, broken)))
    assert all(math.isnan(mean.value) for mean in means.values())
    assert {"general/kl", "general/kl_first", "general/nll", "general/nll_change"} <= set(means)
    assert means["general/kl"].interval is None
