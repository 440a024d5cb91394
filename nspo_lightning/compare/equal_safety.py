"""What methods are worth at the same safety: checkpoints at a cut, differences seed by seed, a bootstrap over seeds.

Pure functions, no torch. A *cut* is an unsafe rate on validation prompts. What a run reaches there is the best of its
checkpoints that are at most so unsafe; a method's learning rate is the one with the best mean over seeds, and in a
bootstrap that choice is made anew in each resample.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nspo_lightning.compare.results import RunResult, Value
from nspo_lightning.compare.selection import mean_and_spread
from nspo_lightning.evaluation.rates import UNSAFE, is_at_most

Reached = Mapping[float | None, Mapping[int, float]]
"""Learning rate -> seed -> what was reached at a cut; larger = better, minus infinity where a run never got there."""

_ALL_RESAMPLES = 4096
_RANDOM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A method at a cut: its best learning rate, and a checkpoint for each seed."""

    learning_rate: float | None
    checkpoints: Mapping[int, Mapping[str, float]]

    def mean(self, metric: str) -> float:
        """Average a metric over seeds; NaN where it was not measured."""
        return fmean(point.get(metric, math.nan) for point in self.checkpoints.values())


def cut_at(runs: Sequence[RunResult], value: Value, unsafe: float) -> Cut | None:
    """Return the checkpoints of a method at a cut, None where no learning rate got there at every seed.

    Args:
        runs: All runs of a method.
        value: What the checkpoints and the learning rate are chosen by.
        unsafe: The cut.
    """
    by_rate = reached(runs, value, unsafe)
    seeds = sorted({run.spec.seed for run in runs})
    rate = max(by_rate, key=lambda rate: _mean(by_rate[rate], seeds))
    if _mean(by_rate[rate], seeds) == -math.inf:
        return None
    chosen = {run.spec.seed: run for run in runs if run.spec.learning_rate == rate}
    safe = {seed: [p for p in chosen[seed].trajectory if is_at_most(p[UNSAFE], unsafe)] for seed in seeds}
    return Cut(learning_rate=rate, checkpoints={seed: max(points, key=value) for seed, points in safe.items()})


def reached(runs: Sequence[RunResult], value: Value, unsafe: float) -> Reached:
    """Return what each run reaches at a cut."""
    found: dict[float | None, dict[int, float]] = {}
    for run in runs:
        safe = (point for point in run.trajectory if is_at_most(point[UNSAFE], unsafe))
        best = max((value(point) for point in safe), default=-math.inf)
        found.setdefault(run.spec.learning_rate, {})[run.spec.seed] = best
    return found


def paired_difference(ours: Cut, theirs: Cut, metric: str) -> tuple[float, float]:
    """Return mean and spread, over the seeds that both have, of a metric less the other method's at the same seed."""
    seeds = sorted(set(ours.checkpoints) & set(theirs.checkpoints))
    pairs = [ours.checkpoints[s].get(metric, math.nan) - theirs.checkpoints[s].get(metric, math.nan) for s in seeds]
    return mean_and_spread(pairs)


def shares_of_best(levels: Sequence[Mapping[str, Reached]]) -> dict[str, float]:
    """Return the bootstrap probability that a method is on the front: nowhere worse than all others at once.

    Args:
        levels: For each cut, method -> what its runs reach there. With one cut it is the probability of being best.

    Returns:
        Method -> share of the resamples of the `paired_seeds` (drawn with replacement, the same for all methods, since
        they are paired) in which its mean is the largest at one of the cuts at least; ties count for all that share
        them. A method, or a learning rate, that was not run at all of these seeds takes no part.

    Example:
        >>> better, worse = {0.1: {0: 2.0, 1: 2.0}}, {0.1: {0: 1.0, 1: 3.0}}
        >>> shares_of_best([{"a": better, "b": worse}])  # of (0, 0), (0, 1), (1, 0), (1, 1)
        {'a': 0.75, 'b': 0.75}
    """
    paired = paired_seeds(levels)
    if not paired:
        return {}
    complete = [
        {
            name: whole
            for name, found in level.items()
            if (whole := [of_rate for of_rate in found.values() if of_rate.keys() >= set(paired)])
        }
        for level in levels
    ]
    counts, total = {name: 0 for level in complete for name in level}, 0
    for seeds in resamples(paired):
        total += 1
        front: set[str] = set()
        for level in complete:
            means = {name: max(_mean(of_rate, seeds) for of_rate in whole) for name, whole in level.items()}
            best = max(means.values())
            front |= {name for name, mean in means.items() if mean == best > -math.inf}
        for name in front:
            counts[name] += 1
    return {name: count / max(total, 1) for name, count in counts.items()}


def paired_seeds(levels: Sequence[Mapping[str, Reached]]) -> list[int]:
    """Return the seeds that are drawn from: as many as two methods have, and of these what most methods have.

    One method with a single seed so does not take the seeds of the others away. Empty where there is nothing to pair.

    Example:
        >>> three, one = {0.1: {0: 2.0, 1: 2.0, 2: 1.0}}, {0.1: {0: 3.0}}
        >>> paired_seeds([{"a": three, "b": three, "c": one}])
        [0, 1, 2]
    """
    runs: dict[str, set[frozenset[int]]] = {}
    for level in levels:
        for name, found in level.items():
            runs.setdefault(name, set()).update(frozenset(of_rate) for of_rate in found.values())
    candidates = {seeds for of_method in runs.values() for seeds in of_method}
    candidates |= {a & b for a in candidates for b in candidates}
    have = {seeds: sum(any(own >= seeds for own in of_method) for of_method in runs.values()) for seeds in candidates}
    shared = [seeds for seeds in candidates if seeds and have[seeds] >= min(2, len(runs))]
    return sorted(max(shared, key=lambda seeds: (len(seeds), have[seeds], [-s for s in sorted(seeds)]), default=()))


def resamples(seeds: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield resamples of seeds with replacement: all of them where they are few, else random ones, always the same."""
    n = len(seeds)
    if n == 0:
        return
    if n**n <= _ALL_RESAMPLES:
        yield from itertools.product(seeds, repeat=n)
        return
    draw = random.Random(0)
    for _ in range(_RANDOM_RESAMPLES):
        yield tuple(draw.choices(seeds, k=n))


def _mean(of_rate: Mapping[int, float], seeds: Sequence[int]) -> float:
    return fmean(of_rate.get(seed, -math.inf) for seed in seeds)
