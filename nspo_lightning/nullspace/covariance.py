"""Second moments of layer inputs: C = X^T X / N over the rows X (tokens, width) that count.

The moment is *uncentred*: D x = 0 must hold for the inputs themselves, not for their deviation from a mean.
Padding never counts, and the sums are float32 at least, whatever the model computes in. Rows are gathered on the
device that they are on until a matrix product over them is efficient; calibration sets with fewer tokens than the layer
is wide are summed in float64 throughout, because a Gram matrix squares the condition number and float32 would lose
directions below 3e-4 of the largest singular value. So are rows whose norm is far above the others' (the massive
activations of large models): in float32 the rounding of their squares would cover what ordinary rows add.

A float32 product never runs over more than `fold_rows` rows before it is folded into the float64 sum: longer ones round
more. Up to a width of 8,192 that is; beyond it the sum is float32, and so are all products.

On a GPU nothing waits for it: one number is read for each fold (are there massive rows?), none for each batch.
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
FLOAT64_SUM_WIDTH = 8192  # beyond it, the running sum stays float32: 0.25 GB instead of 0.5 GB a layer
_FOLD_ROWS = 2048  # rows gathered before a product: tall enough that the matrix product runs at full speed
_TILED = {1024: 8, 512: 4}  # least width -> column tiles of the symmetric product: 36 of 64 tile products, 10 of 16
_MASSIVE = 64.0  # a row with more than so many times the median energy is multiplied in float64


def fold_rows(width: int) -> int:
    """Return how many rows of an input are gathered before they are multiplied."""
    return max(_FOLD_ROWS, width)


def rows_that_count(mask: Tensor) -> Tensor | None:
    """Return the flat positions of a mask's True (non-zero) entries on its device, None if all are.

    Reads from the device: a forward pass asks once, not each of its layers.
    """
    found = mask.reshape(-1).nonzero().squeeze(1)
    return None if found.numel() == mask.numel() else found


def select_rows(
    inputs: Tensor, mask: Tensor | None, *, layer: str = "this layer", counted: Tensor | None = None
) -> Tensor:
    """Return the rows of ``inputs`` that count, as a matrix.

    Args:
        inputs: A layer's input, shape ``(..., width)``.
        mask: True (or non-zero) = counts, shape ``inputs.shape[:-1]`` or the first dimensions of it; None = all count.
        layer: Name used in the error message.
        counted: The mask's `rows_that_count`, on the device of the inputs; None = find them.

    Returns:
        Shape ``(rows, width)``; may share memory with ``inputs``.

    Raises:
        ValueError: If the mask cannot be laid over the input's rows.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return rows
    counted = rows_that_count(mask.to(rows.device)) if counted is None else counted
    if counted is None:
        return rows
    if mask.shape == inputs.shape[:-1]:
        return rows.index_select(0, counted)
    if mask.shape == inputs.shape[: mask.ndim]:  # several rows a token, as each of its experts has one
        return inputs.flatten(0, mask.ndim - 1).index_select(0, counted).reshape(-1, inputs.shape[-1])
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
    count = next((tiles for least, tiles in _TILED.items() if width >= least), 1)
    return itertools.pairwise(width * i // count for i in range(count + 1))


class SecondMoment:
    """Running sum of x x^T over rows, and how many rows there were.

    Up to a width of 8,192 products are float64 while the rows are fewer than ``width`` or the width is at most 256, and
    for massive rows; float32 for the others.

    Args:
        width: Number of input features.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows = 0
        self.gathered = 0
        """Rows that wait for a product."""
        self._sum: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._rounded: Tensor | float = 0.0

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``; they are copied unless they are used up at once."""
        self.rows += rows.shape[0]
        full = fold_rows(self.width)
        while rows.shape[0] >= full:
            self._add(rows[:full])
            rows = rows[full:]
        if rows.shape[0]:
            self._waiting.append(rows.to(torch.float32, copy=True))
            self.gathered += rows.shape[0]
        if self.gathered >= full:
            self.fold()

    def fold(self) -> None:
        """Add the product of the rows that wait to the sum."""
        if self._waiting:
            rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._waiting, self.gathered = [], 0
            self._add(rows, own=True)

    def take(self) -> Tensor:
        """Return C = sum / rows in the memory of the sum, which is gone afterwards.

        float64 (float32 beyond 8,192 features); zero where nothing was seen.
        """
        total, self._sum = self.total(), None
        return total.div_(max(self.rows, 1))

    def total(self) -> Tensor:
        """Return the sum of x x^T, shape ``(width, width)``."""
        self.fold()
        return mirror_(self._total_on(torch.device("cpu")))

    @property
    def resolution(self) -> float:
        """Relative size of rounding noise in the eigenvalues, in units of `rounded_energy` or of the largest."""
        return torch.finfo(torch.float32 if float(self._rounded) else torch.float64).eps

    @property
    def rounded_energy(self) -> float:
        """Trace of the part of C whose rounding counts; infinite where all of it does."""
        if float(self._rounded) and self.width <= FLOAT64_SUM_WIDTH:
            return float(self._rounded) / max(self.rows, 1)
        return math.inf

    def all_reduce(self) -> None:
        """Add up over ranks (cross-rank synchronisation)."""
        total = self.total()
        counts = torch.tensor([self.rows, float(self._rounded)], dtype=torch.float64)
        self._sum = ranks.all_reduce_sum(total)
        counts = ranks.all_reduce_sum(counts)
        self.rows, self._rounded = int(counts[0]), float(counts[1])

    def _add(self, rows: Tensor, *, own: bool = False) -> None:
        """Add the product of rows to the sum; ``own`` = they may be overwritten."""
        total, wide = self._total_on(rows.device), self.width > FLOAT64_SUM_WIDTH
        if not wide and (self.rows <= self.width or self.width <= _FLOAT64_PRODUCT_WIDTH):
            add_gram_(total, rows.to(torch.float64))
            return
        rows = rows.to(torch.float32)
        energy = torch.linalg.vector_norm(rows, dim=1).square()
        if not wide and total.dtype == torch.float64:
            massive = energy > _MASSIVE * energy.median()
            if bool(massive.any()):
                add_gram_(total, rows[massive].to(torch.float64))
                rows = (rows.masked_fill_ if own else rows.masked_fill)(massive.unsqueeze(1), 0.0)
                energy = energy.masked_fill(massive, 0.0)
        self._rounded = self._rounded + energy.sum(dtype=torch.float64)
        add_gram_(total, rows)

    def _total_on(self, device: torch.device) -> Tensor:
        if self._sum is None:
            double = self.width <= FLOAT64_SUM_WIDTH and device.type != "mps"
            dtype = torch.float64 if double else torch.float32
            self._sum = torch.zeros(self.width, self.width, dtype=dtype, device=device)
        return self._sum


def fold_together(sums: Iterable[object]) -> None:
    """Fold the sums of one input's domains once their rows together are as many as one of them would gather."""
    waiting = [s for s in sums if isinstance(s, SecondMoment) and s.gathered]
    if len(waiting) > 1 and sum(s.gathered for s in waiting) >= fold_rows(waiting[0].width):
        for moment in waiting:
            moment.fold()
