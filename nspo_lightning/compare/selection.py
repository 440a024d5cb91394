"""Which checkpoint counts, what a method's front is, and how sure a rate is: pure functions, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

UNSAFE = "safety/unsafe_rate"


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
        if unsafe <= self.unsafe_limit:
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


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats: less unsafe and at least as able.

    Args:
        points: (unsafe rate, ability), ability larger = better.

    Returns:
        The front, unsafe rate ascending and ability strictly ascending.

    Example:
        >>> front([(0.1, 0.9), (0.0, 0.8), (0.1, 0.7), (0.2, 0.85)])
        [(0.0, 0.8), (0.1, 0.9)]
    """
    best: list[tuple[float, float]] = []
    for unsafe, ability in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or ability > best[-1][1]:
            best.append((unsafe, ability))
    return best


def front_at(points: Iterable[tuple[float, float]], unsafe: float) -> float:
    """Return the best ability to be had at an unsafe rate of at most ``unsafe`` (minus infinity if none is)."""
    return max((ability for rate, ability in points if rate <= unsafe), default=-math.inf)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation over seeds (Bessel-corrected, 0 for one)."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
