"""The leading part of a spectrum, where a cut is known to lie in it: several times cheaper than all of it.

Block subspace iteration (Saad, Numerical Methods for Large Eigenvalue Problems, chapter 5): Q <- orth(C Q), begun in
float32 and finished in float64, then Rayleigh-Ritz, T = Q^T C Q = W diag(theta) W^T. The trace of C is known exactly,
so the energy outside the leading directions is too. A result is only returned when the residuals
R = C V - V diag(theta) of the leading directions V prove it (Davis and Kahan's sin-theta theorem):

    sin(angle between span V and the exact subspace) <= ||R_k||_F / (theta_k - theta_{k+1} - ||r_{k+1}||) <= accuracy.

The bound takes for granted what a Gaussian start makes certain but for a set of measure zero: that no leading direction
was orthogonal to the start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FindCut = Callable[[Tensor], int]
"""From eigenvalues (descending, the far ones only by their sum) to the number of protected directions."""

LEAST_WIDTH = 1024  # below it a full eigendecomposition takes less than 0.2 s
MOST_WIDTH = 8192  # beyond it second moments are float32 sums, and a float64 copy would double their memory
ACCURACY = 1e-7
"""Largest sine of an angle between the protected directions found and the exact ones."""
_LARGEST_BLOCK = 0.35  # of the width: from there on the full decomposition is as fast
_FINAL_ROUNDS = 2  # float64 rounds, each two products; more of them cost what the full decomposition costs


def with_tail(leading: Tensor, trace: float, width: int) -> Tensor:
    """Return eigenvalues of full length: the leading ones, then what is left of the trace, spread evenly.

    Args:
        leading: Descending, shape ``(m,)``.
        trace: Sum of all eigenvalues.
        width: Number of all eigenvalues.

    Returns:
        Descending, shape ``(width,)``, float64. Leading values that lie below the mean of what follows them (lower
        bounds that have not converged) join the tail.

    Example:
        >>> with_tail(torch.tensor([6.0, 3.0]), 10.0, 4)
        tensor([6.0000, 3.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    leading = leading.to(device="cpu", dtype=torch.float64).clamp_min(0)
    count = torch.arange(1, leading.numel() + 1, dtype=torch.float64)
    rest = (trace - leading.cumsum(0)).clamp_min(0) / (width - count).clamp_min(1)
    sound = int((leading >= rest).cumprod(0).sum())
    left = max(trace - float(leading[:sound].sum()), 0.0)
    tail = torch.full((width - sound,), left / max(width - sound, 1), dtype=torch.float64)
    return torch.cat([leading[:sound], tail])


def leading_eigenpairs(moment: Tensor, find_cut: FindCut, *, count: int | None = None) -> tuple[Tensor, Tensor] | None:
    """Return the eigenpairs that a cut protects, or None where only the full decomposition finds them as exactly.

    Args:
        moment: C, symmetric, positive semi-definite, finite, float64, shape ``(width, width)``.
        find_cut: Returns k for given eigenvalues, see `FindCut`.
        count: The number k, where it is known beforehand.

    Returns:
        ``values``, shape ``(width,)``, float64 on the CPU: k eigenvalues, an upper bound of the next one, and others
        that sum up to the right energy; ``vectors``, shape ``(width, k)``, float64. None if the cut lies outside the
        block that pays, if it falls into a cluster of eigenvalues, or if the residuals do not reach `ACCURACY`.
    """
    width, trace = moment.shape[0], float(moment.diagonal().sum())
    if trace <= 0:
        return None
    columns = _columns(width, count)
    if count is not None and count >= columns:
        return None
    image = _probe(moment.to(torch.float32), find_cut, columns, trace)
    if image is None:
        return None
    for _ in range(_FINAL_ROUNDS):
        block = torch.linalg.qr(moment @ image.to(moment.dtype)).Q
        image = moment @ block
        ritz, rotation = torch.linalg.eigh(block.T @ image)
        ritz, rotation = ritz.flip(0), rotation.flip(1)
        k = find_cut(with_tail(ritz, trace, width))
        if not 0 < k < ritz.numel():
            return None
        rotation = rotation[:, : k + 1]
        vectors = block @ rotation
        residuals = torch.linalg.vector_norm(image @ rotation - vectors * ritz[: k + 1], dim=0)
        gap = float(ritz[k - 1] - ritz[k] - residuals[k])
        if float(torch.linalg.vector_norm(residuals[:k])) <= ACCURACY * gap:
            ritz[k] += residuals[k]  # a bound from above: certificates count the largest energy left outside with it
            return with_tail(ritz, trace, width), vectors[:, :k]
    return None


def _columns(width: int, count: int | None) -> int:
    most = int(_LARGEST_BLOCK * width)
    return most if count is None else min(_enough(count), most)


def _enough(k: int) -> int:
    """Return a block size for k directions: a few more, so that the last ones converge as well."""
    return k + max(64, k // 16)


def _probe(single: Tensor, find_cut: FindCut, columns: int, trace: float) -> Tensor | None:
    """Return an orthonormal float32 block after two products that holds the cut, None where it is hopeless."""
    width = single.shape[0]
    generator = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(single @ torch.randn(width, columns, generator=generator).to(single.device)).Q
    image = single @ block
    ritz, rotation = torch.linalg.eigh(block.T @ image)
    ritz, rotation = ritz.flip(0).clamp_min(0), rotation.flip(1)
    k = find_cut(with_tail(ritz, trace, width))
    if not 0 < k < columns or float(ritz[k - 1]) <= 0:
        return None
    # Each product shrinks what is wrong with direction k by theta_b / theta_k; the gap decides how much must go.
    gap = 1 - float(ritz[k] / ritz[k - 1])
    sizes = {min(_enough(k) * 2**i, columns) for i in range(columns.bit_length())}
    choices = sorted((size * rounds, size, rounds) for size in sizes for rounds in range(1, _FINAL_ROUNDS + 1))
    for _, size, rounds in choices:  # cheapest first
        shrink = float(ritz[size - 1] / ritz[k - 1])
        if gap > 0 and shrink ** (1 + 2 * rounds) <= ACCURACY * gap:
            start: Tensor = torch.linalg.qr(image if size >= columns else image @ rotation[:, :size]).Q
            return start
    return None
