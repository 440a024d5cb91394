"""Group-relative advantages (GRPO, arXiv:2402.03300, section 4.1; unscaled form: Dr. GRPO, arXiv:2503.20783)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]

_EPSILON = 1e-4
"""Added to a standard deviation before a reward is divided by it."""


def group_advantages(
    rewards: Tensor,
    group_size: int,
    scale: AdvantageScale = "group",
    batch_rewards: Tensor | None = None,
) -> Tensor:
    """Compare each reward with its group: (r - mean_group) / (std + 1e-4), with Bessel's correction.

    A NaN reward marks a sample that nothing could judge: it counts in no mean and no deviation, and its advantage is
    zero. A group in which all rewards are equal has no signal: its advantages are exactly zero.

    Args:
        rewards: Shape (P * G,), row ``p * G + g`` for completion g of prompt p.
        group_size: G.
        scale: Divide by the standard deviation of the group, of the whole batch, or not at all.
        batch_rewards: The rewards of the whole batch, where these are one rank's part of it; shape (any,). Only its
            standard deviation counts, only for `scale` "batch". None = these are the batch.

    Returns:
        Advantages, shape (P * G,), float32 (float64 for float64 rewards).

    Raises:
        ValueError: If rewards are not a whole number of groups, or `scale` is unknown.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2, scale="none")
        tensor([-1.,  1.,  0.,  0.])
    """
    if rewards.ndim != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"Expected a vector of rewards whose length is a multiple of group_size={group_size}, got shape "
            f"{tuple(rewards.shape)}. Order the rewards prompt by prompt, group_size of them each."
        )
    if scale not in {"group", "batch", "none"}:
        raise ValueError(f"`scale` must be 'group', 'batch' or 'none', got {scale!r}.")
    groups = rewards.reshape(-1, group_size)
    groups = groups if groups.dtype == torch.float64 else groups.float()
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    # Equal rewards can leave a rounding error of the mean, which the division would turn into a signal.
    low = groups.masked_fill(groups.isnan(), torch.inf).amin(1, keepdim=True)
    high = groups.masked_fill(groups.isnan(), -torch.inf).amax(1, keepdim=True)
    centred = torch.where(high > low, centred, torch.zeros_like(centred))
    if scale == "group":
        centred = centred / (_nan_std(groups) + _EPSILON)
    elif scale == "batch":
        batch = groups if batch_rewards is None else batch_rewards.to(groups)
        centred = centred / (_nan_std(batch.reshape(1, -1)) + _EPSILON)
    return centred.nan_to_num(0.0).reshape(-1).masked_fill(rewards.isnan(), 0.0)


def rows_with_signal(advantages: Tensor, mask: Tensor, *, has_kl: bool) -> Tensor:
    """Return which completions can have a gradient, shape (R,), bool.

    A row has one only through tokens that are trained on, and then from its advantage or from a KL term. Groups
    without such a row have a zero gradient: leaving them out of the forward and backward passes changes no number.

    Args:
        advantages: Shape (R,).
        mask: Shape (R, C), bool, True = token that is trained on.
        has_kl: Whether the loss has a KL term, which teaches without an advantage too.

    Returns:
        True = at least one token is trained on, with an advantage that is not zero or with a KL term.
    """
    trained = mask.any(dim=1)
    return trained if has_kl else trained & (advantages != 0)


def _nan_std(groups: Tensor) -> Tensor:
    """Return the Bessel-corrected deviation of each row without its NaN, shape (P, 1); 0 for fewer than two values."""
    count = (~groups.isnan()).sum(1, keepdim=True)
    squares = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
