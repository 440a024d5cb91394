"""Let all ranks fail together when a reward fails on one, so that none waits for ever in the next all-reduce."""

from __future__ import annotations

from nspo_lightning import ranks
from nspo_lightning.rewards.protocol import NonFiniteRewardError, RewardError


def raise_on_all_ranks(error: RewardError | None) -> None:
    """Raise if any rank of a distributed run has an error; every rank must call this equally often.

    The usual case costs one all-reduce of a single number; messages travel only when there is one. A rank whose reward
    hangs gets here when its `timeout_s` is over, so that must be shorter than the process group's own timeout.

    Raises:
        RewardError: On all ranks alike: the lowest failing rank's error, which names that rank and how many failed (one
            that is not just a number that is not finite goes first).
    """
    if ranks.world_size() == 1 and error is not None:
        raise error
    if not ranks.any_rank(error is not None):
        return
    told = None if error is None else (isinstance(error, NonFiniteRewardError), str(error), error.reward)
    failed = [(rank, *found) for rank, found in enumerate(ranks.gather_objects(told)) if found is not None]
    rank, accident, message, reward = min(failed, key=lambda found: (found[1], found[0]))  # the graver first
    together = (NonFiniteRewardError if accident else RewardError)(
        f"On rank {rank} (of {ranks.world_size()}; {len(failed)} failed, all stop together): {message}", reward
    )
    together.raised_on_all_ranks = True
    raise together from error
