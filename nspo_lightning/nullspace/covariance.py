"""Second moments of layer inputs: C = X^T X / N over the rows X (tokens, width) that count.

The moment is *uncentred*: D x = 0 must hold for the inputs themselves, not for their deviation from a mean.
Padding never counts, and the sums are float32 at least, whatever the model computes in. Rows are gathered until a
matrix product over them is efficient; calibration sets with fewer tokens than the layer is wide are summed in float64
throughout, because a Gram matrix squares the condition number and float32 would lose directions below
3e-4 of the largest singular value. So are rows whose norm is far above the others' (the massive activations of large
models): in float32 the rounding of their squares would cover what ordinary rows add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.compat.torch import full_precision_products

_FLOAT64_PRODUCT_WIDTH = 256  # up to this width a float64 product costs less than the Python around it
_FLOAT64_SUM_WIDTH = 8192  # beyond it, the running sum stays float32: 0.25 GB instead of 0.5 GB a layer
_FOLD_ROWS = 2048  # rows gathered before a product: tall enough that the matrix product runs at full speed
_TILES = 4  # column tiles of the symmetric product: 10 of 16 tile products instead of 16
_TILED_WIDTH = 512  # below it one product is faster than four
_MASSIVE = 64.0  # a row with more than so many times the median energy is multiplied in float64


def select_rows(inputs: Tensor, mask: Tensor | None, *, layer: str = "this layer") -> Tensor:
    """Return the rows of ``inputs`` that count, as a matrix.

    Args:
        inputs: A layer's input, shape ``(..., width)``.
        mask: True (or non-zero) = counts, shape ``inputs.shape[:-1]``; None = all count.
        layer: Name used in the error message.

    Returns:
        Shape ``(rows, width)``; may share memory with ``inputs``.

    Raises:
        ValueError: If the mask cannot be laid over the input's rows.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return rows
    keep = mask.to(device=rows.device).ne(0)
    if mask.shape == inputs.shape[:-1]:
        return rows[keep.reshape(-1)]
    if bool(keep.all()):
        return rows
    # As many rows is not enough: they may come in another order (transposed, routed to experts, sorted).
    raise ValueError(
        f"The mask must have the shape of the rows that enter {layer}: they are {tuple(inputs.shape[:-1])}, the mask "
        f"is {tuple(mask.shape)} and some of it is False. This happens when tokens are transposed, flattened or routed "
        "(mixture of experts). Calibrate with batches without padding (one text each, "
        "`data.calibration_batch_size: 1`), so that every row counts, or return a mask of that shape from "
        "`batch_to_inputs`."
    )


def add_gram_(total: Tensor, rows: Tensor) -> Tensor:
    """Add rows^T rows to the upper column tiles of ``total``, in place; `mirror_` fills in the rest.

    Args:
        total: Shape ``(width, width)``; in the rows' dtype the product adds up inside the matrix product, which saves
            a pass over memory.
        rows: Shape ``(n, width)``; their dtype is the product's.

    Returns:
        ``total``.

    Example:
        >>> mirror_(add_gram_(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        tensor([[10., 14.],
                [14., 20.]])
    """
    # TF32 products would put 1e-3 of relative noise into the spectrum's tail.
    with torch.autocast(device_type=rows.device.type, enabled=False), full_precision_products():
        for start, end in _tiles(rows.shape[1]):
            target = total[start:end, start:]
            if total.dtype == rows.dtype:
                target.addmm_(rows[:, start:end].T, rows[:, start:])
            else:
                target.add_(rows[:, start:end].T @ rows[:, start:])
    return total


def mirror_(total: Tensor) -> Tensor:
    """Copy the upper column tiles below the diagonal, in place, and return the matrix."""
    for start, end in _tiles(total.shape[1]):
        total[end:, start:end] = total[start:end, end:].T
    return total


def _tiles(width: int) -> Iterable[tuple[int, int]]:
    count = _TILES if width >= _TILED_WIDTH else 1
    return itertools.pairwise(width * i // count for i in range(count + 1))


class SecondMoment:
    """Running sum of x x^T over rows, and how many rows there were.

    Products are float64 while the rows are fewer than ``width`` or the width is at most 256, and for massive rows;
    float32 for the others.

    Args:
        width: Number of input features.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows = 0
        self._sum: Tensor | None = None
        self._pending: list[Tensor] = []
        self._pending_rows = 0
        self._float32_energy = 0.0

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``; they are copied unless they are used up at once."""
        if rows.shape[0] == 0:
            return
        self.rows += rows.shape[0]
        self._pending_rows += rows.shape[0]
        if self._pending_rows >= max(_FOLD_ROWS, self.width):
            self._pending.append(rows)
            self._fold()
        else:
            self._pending.append(rows.to(torch.float32, copy=True))

    def second_moment(self) -> Tensor:
        """Return C = sum / rows in float64 (float32 beyond 8,192 features), zero where nothing was seen."""
        return self.total() / max(self.rows, 1)

    def total(self) -> Tensor:
        """Return the sum of x x^T, shape ``(width, width)``."""
        if self._pending_rows or self._sum is None:
            self._fold()
        assert self._sum is not None  # _fold always leaves one
        return mirror_(self._sum)

    @property
    def resolution(self) -> float:
        """Relative size of rounding noise in the eigenvalues, in units of `rounded_energy` or of the largest."""
        return torch.finfo(torch.float32 if self._float32_energy else torch.float64).eps

    @property
    def rounded_energy(self) -> float:
        """Trace of the part of C whose rounding counts; infinite where all of it does."""
        if self._float32_energy and self.width <= _FLOAT64_SUM_WIDTH:
            return self._float32_energy / max(self.rows, 1)
        return math.inf

    def all_reduce(self) -> None:
        """Add up over ranks (cross-rank synchronisation)."""
        total = self.total()
        counts = torch.tensor([self.rows, self._float32_energy], dtype=torch.float64)
        self._sum = ranks.all_reduce_sum(total)
        counts = ranks.all_reduce_sum(counts)
        self.rows, self._float32_energy = int(counts[0]), float(counts[1])

    def _fold(self) -> None:
        """Add the product of the rows gathered to the sum."""
        exact = self.rows <= self.width or self.width <= _FLOAT64_PRODUCT_WIDTH
        dtype = torch.float64 if exact else torch.float32
        parts = [part.to(dtype) for part in self._pending] or [torch.zeros(0, self.width, dtype=dtype)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        total = self._total_on(rows.device)
        if not exact and total.dtype == torch.float64:
            energy = rows.square().sum(1, dtype=torch.float64)
            massive = energy > _MASSIVE * energy.median()
            if bool(massive.any()):
                add_gram_(total, rows[massive].to(torch.float64))
                rows, energy = rows[~massive], energy[~massive]
            self._float32_energy += float(energy.sum())
        elif not exact:
            self._float32_energy += float(rows.square().sum(dtype=torch.float64))
        add_gram_(total, rows)
        self._pending, self._pending_rows = [], 0

    def _total_on(self, device: torch.device) -> Tensor:
        if self._sum is None:
            double = self.width <= _FLOAT64_SUM_WIDTH and device.type != "mps"
            dtype = torch.float64 if double else torch.float32
            self._sum = torch.zeros(self.width, self.width, dtype=dtype, device=device)
        return self._sum
