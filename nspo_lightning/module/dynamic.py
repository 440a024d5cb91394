"""Dynamic sampling (DAPO, arXiv 2503.14476): prompts whose groups have no signal are replaced by others from the data.

A batch is answered. As long as groups with a signal are missing, so many further prompts are taken from the data and
answered too, by the same policy, up to `max_factor` times the batch. A round takes no more prompts than are missing, so
hardly a group with a signal is ever left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nspo_lightning.module.rollout_metrics import JudgedRows, rollout_metrics
from nspo_lightning.module.signal import groups_with_signal


@dataclass(frozen=True)
class DynamicSampling:
    """How prompts without a signal are replaced.

    Attributes:
        max_factor: Prompts that a batch may take from the data, as a multiple of its size; at least 2.
    """

    max_factor: int = 4

    def __post_init__(self) -> None:
        """Check the value."""
        if self.max_factor < 2:
            raise ValueError(
                f"`dynamic_sampling.max_factor` must be at least 2, got {self.max_factor}: a batch may then take twice "
                "its prompts from the data. For no dynamic sampling set `dynamic_sampling: null`."
            )


def dynamic_metrics(
    everyone: JudgedRows, kept: JudgedRows, *, rounds: int, wanted: int, group_size: int, cut: bool
) -> dict[str, float]:
    """Say what a batch took; `reward` and `unsafe` beside it are over all that was drawn.

    Args:
        everyone: All that was drawn, of all ranks.
        kept: The groups that are learnt from.
        rounds: Draws.
        wanted: Groups of the batch.
        group_size: G.
        cut: Whether completions that the length limit cut are left out.

    Returns:
        What is logged, by name.
    """
    signal = groups_with_signal(everyone, group_size, mask_truncated=cut)
    learnt = rollout_metrics(kept, group_size)
    return {
        "dynamic/rounds": float(rounds),
        "dynamic/prompts": float(len(signal)),
        "dynamic/completions": float(len(signal) * group_size),
        "dynamic/factor": len(signal) / wanted,
        "dynamic/without_signal": 1.0 - float(signal.float().mean()),
        "dynamic/groups_kept": float(groups_with_signal(kept, group_size, mask_truncated=cut).sum()),
        "dynamic/reward_kept": float(learnt["reward"]),
        f"dynamic/{kept.harm_name}_kept": float(learnt[kept.harm_name]),
    }


class Group(NamedTuple):
    """A group's place among those that were drawn for one batch; places are in the order of the data."""

    round: int
    prompt: int
    """Of its rank, in this round."""
    rank: int


def further_prompts(wanted: int, with_signal: int, drawn: int, max_factor: int, world_size: int) -> int:
    """Say how many further prompts each rank shall answer: as many as are missing, within the limit.

    Args:
        wanted: Groups of the batch, of all ranks, as the following are.
        with_signal: Groups with a signal so far.
        drawn: Groups so far.
        max_factor: Limit of `drawn`, as a multiple of `wanted`.
        world_size: Ranks; all answer equally many.

    Returns:
        Prompts a rank; 0 = the batch is full, or the limit is reached.
    """
    missing = -(-max(wanted - with_signal, 0) // world_size)
    return min(missing, (max_factor * wanted - drawn) // world_size)


def chosen_groups(signals: Sequence[Tensor], wanted: int, world_size: int) -> list[Group]:
    """Choose what is learnt from; all ranks choose alike.

    Args:
        signals: Of each round: shape (world_size * n,), bool, rank by rank, True = the group has a signal.
        wanted: Groups of the batch, of all ranks.
        world_size: Ranks.

    Returns:
        The first `wanted` groups with a signal. If there are fewer, the first ones without fill the batch up, so that
        one update weighs as much as another. A rank may have none of them.
    """
    every = [
        (Group(number, prompt, rank), bool(signal[rank, prompt]))
        for number, signal in enumerate(flat.view(world_size, -1) for flat in signals)
        for prompt in range(signal.shape[1])
        for rank in range(world_size)
    ]
    order = [group for group, has in every if has] + [group for group, has in every if not has]
    return sorted(order[:wanted])
