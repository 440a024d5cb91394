"""Let all ranks fail together when a reward fails on one, so that none waits for ever in the next all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nspo_lightning.rewards.protocol import NonFiniteRewardError, RewardError

__all__ = ["raise_on_all_ranks"]


def raise_on_all_ranks(error: RewardError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise if any rank of a distributed run has an error; every rank must call this equally often.

    The usual case costs one all-reduce of a single number; messages travel only when there is one. A rank whose reward
    hangs gets here when its `timeout_s` is over, so that must be shorter than the process group's own timeout.

    Args:
        error: what went wrong on this rank, if anything.
        group: the ranks that must agree; all of them by default.

    Raises:
        RewardError: on all ranks alike: the lowest failing rank's error, which names that rank and how many failed (one
            that is not just a number that is not finite goes first).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        if error is not None:
            raise error
        return
    on_gpu = dist.get_backend(group) == "nccl"
    failed = torch.tensor(float(error is not None), device=torch.cuda.current_device() if on_gpu else "cpu")
    dist.all_reduce(failed, group=group)
    if not failed.item():
        return
    world_size = dist.get_world_size(group)
    errors: list[tuple[str, str, bool] | None] = [None] * world_size
    accident = isinstance(error, NonFiniteRewardError)
    dist.all_gather_object(errors, None if error is None else (str(error), error.reward, accident), group=group)
    found = [(rank, *told) for rank, told in enumerate(errors) if told is not None]
    rank, message, reward, accident = min(found, key=lambda told: (told[3], told[0]))  # the graver first
    together = (NonFiniteRewardError if accident else RewardError)(
        f"On rank {rank} (of {world_size}; {int(failed.item())} failed, all stop together): {message}", reward
    )
    together.raised_on_all_ranks = True
    raise together from error
