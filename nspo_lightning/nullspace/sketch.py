"""Leading directions of a second moment too wide to hold: randomized subspace iteration over the calibration text.

Pass 1 sums Y = C Omega for a random Omega (width x s) and orthonormalises it to Q (Halko, Martinsson and Tropp,
arXiv 0909.4061, algorithms 4.1 and 4.4). Each further pass sums Z = C Q, whose Rayleigh-Ritz matrix T = Q^T Z has the
directions Q W inside the range and their true energies; the trace of C is summed as well, so the energy left outside is
known and not estimated. Without a gap in the spectrum one pass misses up to a twentieth of the energy, so the passes go
on with Q <- orth(Z) until the protected energy has settled. Memory: a few width * s numbers instead of width^2.

How large the energy of a single direction outside the range may be is bounded by ten more random vectors of pass 1,
kept apart from those that make Q: ||(I - Q Q^T) C|| <= 10 sqrt(2 / pi) max_i ||(I - Q Q^T) C omega_i|| but for one case
in 10^10 (there, equation 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.compat.torch import full_precision_products
from nspo_lightning.nullspace.basis import Spectrum
from nspo_lightning.nullspace.partial import with_tail

MOST_PASSES = 8  # over the text, for one input
USABLE = 0.75  # share of the columns that may be protected: the last ones converge slowly and serve the others
_NOTHING_LEFT = 5e-4  # share of the energy outside the range: no other subspace of any size can hold more than it more
_SETTLED = 2e-4  # change of the protected share between passes; what later passes add is less than twice that
PROBES = 10  # random vectors that bound what is outside
_PROBE_FACTOR = 10 * math.sqrt(2 / math.pi)


class RangeSketch:
    """Running Z = sum x (x^T Q), the trace sum ||x||^2, and how many rows there were.

    Args:
        width: Input features.
        test: Q, shape ``(width, s)``, float32; the same on all ranks and for all domains.
    """

    def __init__(self, width: int, test: Tensor) -> None:
        self.width, self.rows = width, 0
        self._test = test
        self._sum: Tensor | None = None
        self._trace = torch.zeros((), dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``."""
        if rows.shape[0] == 0:
            return
        rows = rows.to(torch.float32)
        self.rows += rows.shape[0]
        self._test = self._test.to(rows.device)
        with torch.autocast(device_type=rows.device.type, enabled=False), full_precision_products():
            self.total().addmm_(rows.T, rows @ self._test)
        self._trace = self._trace + rows.square().sum(dtype=torch.float64).cpu()

    def total(self) -> Tensor:
        """Return Z, shape ``(width, s)``, zeros before the first row."""
        if self._sum is None:
            self._sum = torch.zeros_like(self._test)
        return self._sum

    def take(self) -> Tensor:
        """Return Z, which this sketch lets go of."""
        total, self._sum = self.total(), None
        return total

    @property
    def trace(self) -> float:
        """Sum of ||x||^2."""
        return float(self._trace)

    def all_reduce(self) -> None:
        """Add up over ranks (cross-rank synchronisation)."""
        self._sum = ranks.all_reduce_sum(self.total())
        counts = ranks.all_reduce_sum(torch.tensor([float(self._trace), float(self.rows)], dtype=torch.float64))
        self._trace, self.rows = counts[0].cpu(), int(counts[1])


def random_test_matrix(width: int, columns: int, seed: int) -> Tensor:
    """Return Omega, shape ``(width, columns)``, Gaussian."""
    return torch.randn(width, columns, generator=torch.Generator().manual_seed(seed))


def combined_image(sketches: Mapping[str, RangeSketch], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of the domains' Z, which the sketches let go of (they share Q, so Z is linear in C)."""
    total: Tensor | None = None
    for name, weight in weights.items():
        part = sketches[name].take().mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@full_precision_products()
def sketch_spectrum(test: Tensor, image: Tensor, *, probes: Tensor, trace: float, tokens: int) -> Spectrum:
    """Rayleigh-Ritz: eigenpairs of C inside the range of Q, and a tail that holds the energy outside.

    Args:
        test: Q, orthonormal columns, shape ``(width, s)``.
        image: C Q, same shape.
        probes: C times `PROBES` random vectors that Q does not depend on, shape ``(width, PROBES)``.
        trace: The trace of C.
        tokens: Rows that C was taken over.

    Returns:
        ``values`` of full length: the Ritz values, then the energy outside Q spread evenly over the other directions;
        ``vectors`` of shape ``(width, 3 s / 4)``, so at most that many directions can be protected.
    """
    inner = (test.T @ image).to(torch.float64)
    ritz, rotation = torch.linalg.eigh((inner + inner.T) / 2)
    usable = max(int(USABLE * test.shape[1]), 1)
    far = probes - test @ (test.T @ probes)
    outside = _PROBE_FACTOR * float(torch.linalg.vector_norm(far, dim=0).max())
    coupling = float(torch.linalg.vector_norm(image - test @ inner.to(test.dtype)))
    rounding = torch.finfo(torch.float32).eps * float(ritz[-1].clamp_min(0))
    return Spectrum(
        values=with_tail(ritz.flip(0), trace, test.shape[0]),
        vectors=test @ rotation.flip(1)[:, :usable].to(test.dtype),
        tokens=tokens,
        outside=min(outside + coupling, trace) + rounding,
    )


def settled(values: Tensor, before: Tensor | None, protected: int, columns: int) -> bool:
    """Return whether another pass could hardly add to the protected energy.

    Args:
        values: Eigenvalues of this pass, full length.
        before: Eigenvalues of the pass before it; None = this is the first.
        protected: The number k.
        columns: The number s.

    Returns:
        True if next to nothing is left outside the range (the k leading eigenvalues of a matrix sum up to at most those
        of two diagonal blocks together), or if the sum of the k leading values has stopped rising.
    """
    trace = float(values.sum())
    if trace <= 0 or float(values[columns:].sum()) <= _NOTHING_LEFT * trace:
        return True
    if before is None:
        return False
    return abs(float(values[:protected].sum() - before[:protected].sum())) <= _SETTLED * trace
