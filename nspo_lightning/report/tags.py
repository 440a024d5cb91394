"""Where TensorBoard shows what: it sorts tags by their folders' names, and knows no other order.

So what a run is about keeps its names (`general/...`, `nullspace/...`, `reward`, `safety/...`), and everything else is
shown in the folder `training`, which comes after them. Metrics that are logged, monitored and written to files keep
their names.
"""

from __future__ import annotations

RESULT = "result"
"""Folder of what was measured at the end, which HParams compares runs by."""
_FIRST = frozenset(("general", "guard", "nullspace", RESULT, "reward", "reward_std", "rewards", "safety", "warmup"))
_MOVED = {"unsafe": "safety/unsafe_in_training", "answered": "safety/answered_in_training"}


def shown_as(metric: str) -> str:
    """Return the tag of a metric in TensorBoard.

    Example:
        >>> shown_as("reward"), shown_as("safety/unsafe_rate"), shown_as("clip_ratio/region_mean"), shown_as("entropy")
        ('reward', 'safety/unsafe_rate', 'training/clip_ratio/region_mean', 'training/entropy')
    """
    if metric in _MOVED:
        return _MOVED[metric]
    return metric if metric.partition("/")[0] in _FIRST else f"training/{metric}"
