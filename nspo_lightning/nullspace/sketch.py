"""Leading directions of a second moment too wide to hold: randomized range finder and exact Rayleigh-Ritz energies.

Pass 1 sums Y = C Omega for a random Omega (width x s) and orthonormalises it to Q (Halko, Martinsson and Tropp,
arXiv 0909.4061, algorithm 4.1). Pass 2 sums T = Q^T C Q (s x s) exactly, whose eigenvectors give the directions
Q W inside the range and whose eigenvalues are their true energies; the trace of C is summed exactly as well, so the
energy left outside is known and not estimated. Memory: 3 width * s numbers instead of width^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import Spectrum
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.partial import with_tail

_MAX_COLUMNS = 4096


def sketch_columns(width: int, budget_bytes: float) -> int:
    """Return how many sketch columns fit into a budget: Omega, Y, Q and a QR workspace, float32 each.

    Raises:
        ValueError: if fewer than 16 fit.
    """
    columns = int(min(budget_bytes / (4.0 * 5 * width), width, _MAX_COLUMNS))
    if columns < 16:
        raise ValueError(
            f"A memory budget of {budget_bytes / 1e9:.3g} GB holds only {columns} sketch columns for an input of width "
            f"{width}; at least 16 are needed. Raise `memory_budget_gb` to {16 * 20 * width / 1e9:.3g} or more."
        )
    return columns


class RangeSketch:
    """Running Y = sum x (x^T Omega) and the trace sum ||x||^2.

    Args:
        width: input features.
        columns: s.
        seed: of Omega, the same on all ranks and for all domains.
    """

    def __init__(self, width: int, columns: int, *, seed: int = 0) -> None:
        self.width, self.columns, self.rows = width, columns, 0
        self._seed = seed
        self._omega: Tensor | None = None
        self._sum: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``."""
        if rows.shape[0] == 0:
            return
        rows = rows.to(torch.float32)
        self.rows += rows.shape[0]
        omega = self._test_matrix(rows.device)
        self.total_on(rows.device).addmm_(rows.T, rows @ omega)

    def total_on(self, device: torch.device) -> Tensor:
        """Return Y, shape ``(width, columns)``, zeros before the first row."""
        if self._sum is None:
            self._sum = torch.zeros(self.width, self.columns, device=device)
        return self._sum

    def all_reduce(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add up over ranks."""
        total = self.total_on(torch.device("cpu"))
        self._sum = reduce_sum(total)
        self.rows = int(reduce_sum(torch.tensor([self.rows], dtype=torch.float64, device=total.device))[0])

    def _test_matrix(self, device: torch.device) -> Tensor:
        if self._omega is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._omega = torch.randn(self.width, self.columns, generator=generator).to(device)
        return self._omega

    @staticmethod
    def combined_range(sketches: Mapping[str, RangeSketch], weights: Mapping[str, float]) -> RangeBasis:
        """Return the range of the weighted sum of the domains' sketches (they share Omega, so Y is linear in C)."""
        first = next(iter(sketches.values()))
        device = first.total_on(torch.device("cpu")).device
        total = torch.zeros_like(first.total_on(device))
        for name, weight in weights.items():
            total.add_(sketches[name].total_on(device), alpha=weight)
        for sketch in sketches.values():
            sketch._omega = sketch._sum = None  # the budget holds one sketch at a time
        return RangeBasis(vectors=torch.linalg.qr(total).Q)


@dataclass(frozen=True, kw_only=True)
class RangeBasis:
    """Orthonormal columns that hold the leading directions of C."""

    vectors: Tensor
    """Q, shape ``(width, columns)``, float32."""

    def accumulator(self, width: int) -> CompressedMoment:
        """Return an accumulator of Q^T C Q."""
        return CompressedMoment(width, self.vectors)


class CompressedMoment:
    """Running T = Q^T (sum x x^T) Q and the trace of sum x x^T."""

    def __init__(self, width: int, vectors: Tensor) -> None:
        self.width = width
        self._vectors = vectors
        self._inner = SecondMoment(vectors.shape[1])
        self.trace = torch.zeros((), dtype=torch.float64)

    @property
    def rows(self) -> int:
        """Rows seen."""
        return self._inner.rows

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``."""
        rows = rows.to(torch.float32)
        self._inner.update(rows @ self._vectors)
        self.trace = self.trace + rows.square().sum(dtype=torch.float64).cpu()

    def all_reduce(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add up over ranks."""
        if self._inner.rows == 0:
            self._inner.update(self._vectors.new_zeros(1, self._vectors.shape[1]))
            self._inner.rows = 0
        self._inner.all_reduce(reduce_sum)
        self.trace = reduce_sum(self.trace.reshape(1))[0]

    def total(self) -> Tensor:
        """Return T, shape ``(columns, columns)``."""
        return self._inner.total()


def sketch_spectrum(basis: RangeBasis, moments: Mapping[str, Any], weights: Mapping[str, float]) -> Spectrum:
    """Rayleigh-Ritz: eigenpairs of C inside the range of Q, and a tail that holds the energy outside.

    Args:
        basis: Q.
        moments: domain -> `CompressedMoment`.
        weights: domain -> weight of its sum (share / rows).

    Returns:
        ``values`` of full length: the Ritz values, then the energy outside Q spread evenly over the other directions;
        ``vectors`` of shape ``(width, columns)``, so at most that many directions can be protected.
    """
    total = sum(weight * moments[name].total().to(torch.float64) for name, weight in weights.items())
    trace = float(sum(weight * float(moments[name].trace) for name, weight in weights.items()))
    assert isinstance(total, Tensor)
    values, rotation = torch.linalg.eigh(total)
    values, rotation = values.flip(0), rotation.flip(1)
    width = basis.vectors.shape[0]
    return Spectrum(
        values=with_tail(values, trace, width),
        vectors=basis.vectors @ rotation.to(basis.vectors.dtype),
        tokens=sum(moments[name].rows for name in weights),
        resolution=torch.finfo(torch.float32).eps,
    )
