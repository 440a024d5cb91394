"""Check what a reward returned before it can become a gradient."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.rewards.protocol import NonFiniteRewardError, RewardError

__all__ = ["score_tensor"]

_LARGEST = 1e30  # float32 holds little more, and weighted sums and deviations must fit too


def score_tensor(name: str, returned: Any, batch_size: int) -> Tensor:
    """Turn a reward's return value into a tensor, or say what is wrong with it.

    Args:
        name: the reward's name, for messages.
        returned: what it returned: a list, tuple, array or 1-dim tensor of numbers and None.
        batch_size: B, how many numbers there must be.

    Returns:
        shape (B,), float32 on the CPU; NaN stands where the reward gave None.

    Raises:
        NonFiniteRewardError: if a number is NaN, infinite or beyond 1e30.
        RewardError: if it is no sequence, has the wrong length, or holds anything but finite numbers and None.
    """
    if isinstance(returned, Tensor):
        returned = returned.detach().cpu()
    if isinstance(returned, (str, bytes, dict)) or not hasattr(returned, "__iter__"):
        raise RewardError(
            f"Reward '{name}' must return a list of {batch_size} numbers or None (one a completion), got "
            f"{_shown(returned)} of type {type(returned).__name__}. Return `[score, ...]` from it.",
            name,
        )
    values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
    if not isinstance(values, list):  # a 0-dim tensor or array
        values = [values]
    if len(values) != batch_size:
        raise RewardError(
            f"Reward '{name}' must return {batch_size} numbers, one a completion in their order, got {len(values)}. "
            f"Return None for a completion that it can't score instead of leaving it out.",
            name,
        )
    return torch.tensor([_number(name, i, value) for i, value in enumerate(values)], dtype=torch.float32)


def _number(name: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (numbers.Real, bool)):
        raise RewardError(
            f"Reward '{name}' must return numbers or None, but sample {index} got {_shown(value)} of type "
            f"{type(value).__name__}. Convert it with float().",
            name,
        )
    number = float(value)
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise NonFiniteRewardError(
            f"Reward '{name}' returned {number} for sample {index}; a reward must be finite, since one such value "
            f"spoils its whole group's update. Return None to exclude the sample, or mend the arithmetic "
            f"(division by zero, log of zero, overflow).",
            name,
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
