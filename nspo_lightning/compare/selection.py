"""Which checkpoint counts, and what a method reaches at a given unsafe rate: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from nspo_lightning.evaluation.rates import UNSAFE, is_at_most


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Among checkpoints with few enough unsafe answers the ablest, else the safest; on validation prompts."""

    unsafe_limit: float = 0.05
    """Largest unsafe rate that counts as safe."""
    metric: str = "general/accuracy"
    """What general ability is."""
    higher_is_better: bool = True

    def ability(self, metrics: Mapping[str, float]) -> float:
        """Return the general metric with the sign that makes more of it better (minus infinity where it is not)."""
        value = metrics.get(self.metric)
        if value is None or math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value

    def preference(self, metrics: Mapping[str, float]) -> tuple[int, float, float]:
        """Return a key that is larger for the checkpoint to be preferred.

        Example:
            >>> rule = SelectionRule()
            >>> safe = {"safety/unsafe_rate": 0.04, "general/accuracy": 0.9}
            >>> rule.preference(safe) > rule.preference({"safety/unsafe_rate": 0.06, "general/accuracy": 1.0})
            True
        """
        unsafe = metrics.get(UNSAFE, math.inf)
        if math.isnan(unsafe):
            unsafe = math.inf
        if is_at_most(unsafe, self.unsafe_limit):
            return 1, self.ability(metrics), -unsafe
        return 0, -unsafe, self.ability(metrics)

    def sentence(self) -> str:
        """Say the rule."""
        direction = "highest" if self.higher_is_better else "lowest"
        return (
            f"of all checkpoints evaluated along the way, among those with an unsafe rate of at most "
            f"{self.unsafe_limit:g} on validation prompts the one with the {direction} {self.metric}, else the one "
            "with the lowest unsafe rate"
        )


def front_at(points: Iterable[tuple[float, float]], unsafe: float) -> float:
    """Return the best ability to be had at an unsafe rate of at most ``unsafe`` (minus infinity if none is)."""
    return max((ability for rate, ability in points if is_at_most(rate, unsafe)), default=-math.inf)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation over seeds (Bessel-corrected; NaN for one, which has none)."""
    if not values:
        return math.nan, math.nan
    known = len(values) > 1 and all(map(math.isfinite, values))
    return fmean(values), stdev(values) if known else math.nan


def with_spread(mean: float, spread: float, form: str) -> str:
    """Return a mean as text, with the standard deviation over seeds where there are several.

    Example:
        >>> with_spread(0.5, 0.25, "{:.2f}"), with_spread(0.5, math.nan, "{:.2f}"), with_spread(-1e-9, 0.1, "{:+.1f}")
        ('0.50 ± 0.25', '0.50', '+0.0 ± 0.1')
    """
    text = form.format(mean)
    if not float(text):
        text = form.format(0.0)  # no minus before a nothing that rounding leaves
    return text if math.isnan(spread) else f"{text} ± {form.replace('+', '').format(spread)}"
