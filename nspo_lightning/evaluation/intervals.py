"""How sure a rate is: an interval from the number of prompts it was counted on."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """Return both ends of Wilson's 95 % score interval of a rate (Wilson 1927): inside [0, 1], not empty at 0 or 1.

    Of a mean over seeds, `successes` need not be whole.

    Raises:
        ValueError: If the numbers are out of range.

    Example:
        >>> low, high = wilson_interval(0, 100)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.037)
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"`successes` must be in [0, total] and `total` at least 1, got {successes} of {total}.")
    z = NormalDist().inv_cdf(0.975)  # 2.5 % beyond each end
    rate = successes / total
    centre = rate + z * z / (2 * total)
    margin = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((centre - margin) / scale, 0.0), min((centre + margin) / scale, 1.0)
