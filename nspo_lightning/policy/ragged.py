"""Moving tokens between a flat list and a padded grid, in both directions and both passes, by pure gathers.

A policy's linear layers work on a flat list of real tokens, no padding computed; attention works on padded grids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    """``x[index]`` with zeros where index is -1, for an index that names each row of x at most once.

    Its gradient then is a gather too, by the inverse index: much faster than the scattered additions that autograd
    has to assume.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _gather(x, index)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _gather(upstream[0], inverse), None, None


def _gather(x: Tensor, index: Tensor) -> Tensor:
    picked = x.index_select(0, index.clamp(min=0))
    missing = index < 0
    return picked.masked_fill_(missing.view(-1, *[1] * (x.ndim - 1)), 0.0)


class Ragged:
    """Real tokens of a padded grid, as a flat list in row order.

    Args:
        mask: Shape (B, T), bool, True = real token.
        size: How many they are, where that is known: nothing then waits for the device. None = count them.
    """

    def __init__(self, mask: Tensor, size: int | None = None) -> None:
        self.mask = mask
        self.shape = mask.shape
        flat = mask.flatten()
        self.size = int(flat.sum()) if size is None else size
        self.is_full = self.size == flat.numel()
        counted = flat.cumsum(0)
        self._number = torch.where(flat, counted - 1, -1)
        self.where = torch.searchsorted(counted, torch.arange(1, self.size + 1, device=mask.device))

    def pack(self, grid: Tensor) -> Tensor:
        """Take the real tokens: shape (B, T, ...) to (size, ...)."""
        rows = grid.flatten(0, 1)
        if self.is_full:
            return rows
        packed: Tensor = _Gather.apply(rows, self.where, self._number)  # type: ignore[no-untyped-call]
        return packed

    def pad(self, flat: Tensor) -> Tensor:
        """Put the real tokens back, zeros elsewhere: shape (size, ...) to (B, T, ...)."""
        if not self.is_full:
            flat = _Gather.apply(flat, self._number, self.where)  # type: ignore[no-untyped-call]
        return flat.reshape(*self.shape, *flat.shape[1:])
