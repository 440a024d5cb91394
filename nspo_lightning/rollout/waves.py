"""4-bit products in waves of few rows, where that reads fewer bytes than one product of all rows.

For few rows bitsandbytes (0.50 and later) has one kernel that reads 4-bit weights and multiplies: 0.5 bytes a
parameter. For more it reads them, writes them in 16 bits and reads those: 0.5 + 2 + 2 = 4.5 bytes. How many rows are
few depends on the layer and the card, from 4 for any to dozens for wide ones; bitsandbytes' own rule is asked. Rows of
a product don't depend on each other, so waves change no number but by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning.compat.bitsandbytes import rule_for_fused_rows

FUSED_BYTES, DEQUANTISED_BYTES = 0.5, 4.5
"""Read and written a parameter."""
EXPECTED_BANDWIDTH = 0.5
"""Share of the memory's bandwidth that a fused wave is counted with, against a plain product's all: not measured."""


def waves(rows: int, fused: Callable[[int], bool]) -> list[int]:
    """Cut the rows of one 4-bit product into waves, nearly equal ones, as few as are all fused.

    Args:
        rows: At least 1.
        fused: Whether a product of that many rows is one kernel.

    Returns:
        Rows of each wave: one wave where the whole is fused, or where waves would move no fewer bytes.

    Example:
        >>> waves(64, lambda rows: rows <= 48), waves(64, lambda rows: rows <= 4)
        ([32, 32], [64])
    """
    most = int(DEQUANTISED_BYTES * EXPECTED_BANDWIDTH / FUSED_BYTES)
    for number in range(1, min(most, rows) + 1):
        sizes = [rows // number + (wave < rows % number) for wave in range(number)]
        if all(fused(size) for size in set(sizes)):
            return sizes
    return [rows]


@contextmanager
def products_in_waves(model: nn.Module) -> Iterator[None]:
    """Run a model's 4-bit layers on CUDA, if it has any, in waves inside the block."""
    changed: list[Any] = []
    for layer in model.modules():
        fused = rule_for_fused_rows(layer)
        if fused is not None and "forward" not in vars(layer):  # else the layer's weights are not 4-bit for now
            layer.forward = _in_waves(layer.forward, fused)
            changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _in_waves(forward: Callable[[Tensor], Tensor], fused: Callable[[int], bool]) -> Callable[[Tensor], Tensor]:
    @cache
    def plan(rows: int) -> list[int]:
        return waves(rows, fused)

    def run(x: Tensor) -> Tensor:
        sizes = plan(x.numel() // x.shape[-1])
        if len(sizes) == 1:
            return forward(x)
        return torch.cat([forward(part) for part in torch.split(x.flatten(0, -2), sizes)]).view(*x.shape[:-1], -1)

    return run
