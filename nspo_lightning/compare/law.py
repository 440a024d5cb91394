"""Is forgetting a matter of how far a run has moved? One line through the methods without a projection, in logarithms.

If log KL on general text is a line in the log of a distance, whatever the method, then methods differ in how far they
go and in nothing else. A method whose checkpoints lie at a tenth of that line forgets ten times less at the same
distance. Pure functions, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, linear_regression

from nspo_lightning.compare.results import RunResult

Point = tuple[float, float]
"""Distance and KL on general text, both positive."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """What a line through some methods says of all of them.

    Attributes:
        slope: Of log KL in log distance.
        explained: R^2 among the methods that the line was drawn through.
        factors: Method -> geometric mean of its checkpoints' KL over the line's at the same distance.
    """

    slope: float
    explained: float
    factors: Mapping[str, float]


def points(runs: Sequence[RunResult], distance: str, forgetting: str) -> list[Point]:
    """Return all checkpoints of runs that have moved at all, and not without bounds."""
    found = [(p[distance], p[forgetting]) for run in runs for p in run.trajectory]
    return [(x, y) for x, y in found if 0 < x < math.inf and 0 < y < math.inf]


def fit_law(common: Mapping[str, Sequence[Point]], others: Mapping[str, Sequence[Point]]) -> Law | None:
    """Draw the line.

    Args:
        common: Method -> checkpoints, of those that the line is drawn through.
        others: The same of those that are held against it.

    Returns:
        The law; None where there are too few different points to draw a line through.

    Example:
        >>> law = fit_law({"a": [(1.0, 2.0), (10.0, 200.0)]}, {"b": [(10.0, 20.0)]})
        >>> round(law.slope, 6), {name: round(factor, 6) for name, factor in law.factors.items()}
        (2.0, {'a': 1.0, 'b': 0.1})
    """
    logs = [(math.log(x), math.log(y)) for of_method in common.values() for x, y in of_method]
    if len({x for x, _ in logs}) < 2 or len({y for _, y in logs}) < 2:
        return None
    xs, ys = zip(*logs, strict=True)
    slope, intercept = linear_regression(xs, ys)
    factors = {
        name: math.exp(fmean(math.log(y) - slope * math.log(x) - intercept for x, y in of_method))
        for name, of_method in {**common, **others}.items()
        if of_method
    }
    return Law(slope=slope, explained=correlation(xs, ys) ** 2, factors=factors)
