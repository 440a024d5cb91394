"""Where each rank's prompts stand in the batch that all ranks make up together.

Ranks take turns, as the data's order deals rows out: prompt j of rank r comes after prompt j of the ranks before r and
before all prompts j + 1. The noise of a completion depends on this place, so a run draws the same completions on one
process and on several that share the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nspo_lightning import ranks


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places of some prompts.

    Attributes:
        total: Prompts of all ranks.
        mine: The place of each prompt of this rank, from 0.
        group_size: Completions of each prompt in the larger batch; None = as many as are drawn.
        first: The place in its group of the first that is drawn.
    """

    total: int
    mine: tuple[int, ...]
    group_size: int | None = None
    first: int = 0


def places(counts: Sequence[int], rank: int) -> Places:
    """Find the places of a rank's prompts.

    Args:
        counts: Prompts of each rank; they may differ.
        rank: This rank.

    Returns:
        Its places.

    Example:
        >>> places([2, 1], rank=0).mine, places([2, 1], rank=1).mine
        ((0, 2), (1,))
    """
    mine = [
        sum(min(count, turn) for count in counts) + sum(count > turn for count in counts[:rank])
        for turn in range(counts[rank])
    ]
    return Places(total=sum(counts), mine=tuple(mine))


def places_among_ranks(prompts: int) -> Places:
    """Find the places of this rank's prompts; all ranks must ask together (cross-rank synchronisation)."""
    return places(ranks.gather_objects(prompts), ranks.rank())
