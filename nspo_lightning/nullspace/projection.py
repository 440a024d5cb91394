"""The projection itself: rows of a matrix kept inside the null space of a basis.

An update D (out x width) of a linear map y = W x leaves the outputs on protected inputs alone if D = D P, so a basis
always acts on *rows*: ``apply(basis, M)`` is M P (hard) or M S (soft), for a matrix M of shape ``(rows, width)``.
Never through the dense P: M - (M U) U^T or (M V) V^T, 2 * rows * width * m multiplications each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nspo_lightning.compat.torch import full_precision_products
from nspo_lightning.nullspace.basis import Basis


def along(matrix: Tensor, vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return M Z diag(w) Z^T, the part of the rows of M along the columns of Z.

    Args:
        matrix: M, shape ``(..., rows, width)``.
        vectors: Z, shape ``(..., width, m)``, orthonormal columns.
        weights: Factors w, shape ``(m,)`` or ``(..., 1, m)``; None = ones.

    Returns:
        Same shape as ``matrix``.

    Example:
        >>> along(torch.tensor([[3.0, 4.0]]), torch.eye(2)[:, :1], torch.tensor([0.5]))
        tensor([[1.5000, 0.0000]])
    """
    with torch.autocast(device_type=matrix.device.type, enabled=False), full_precision_products():
        coordinates = matrix @ vectors
        return (coordinates if weights is None else coordinates * weights) @ vectors.mT


def apply(basis: Basis, matrix: Tensor) -> Tensor:
    """Return ``matrix`` P (hard) or ``matrix`` S (soft), computed in the wider of the two dtypes.

    Args:
        basis: Of the inputs that the matrix acts on.
        matrix: Shape ``(rows, width)``.

    Returns:
        Same shape and dtype as ``matrix``.
    """
    inside = component(basis, matrix)
    return inside if basis.complement else matrix - inside


def component(basis: Basis, matrix: Tensor) -> Tensor:
    """Return ``matrix`` Z diag(w) Z^T, the part along the stored directions, shape ``(rows, width)``."""
    dtype = torch.promote_types(matrix.dtype, basis.vectors.dtype)
    weights = None if basis.weights is None else basis.weights.to(dtype)
    return along(matrix.to(dtype), basis.vectors.to(dtype), weights).to(matrix.dtype)


def protected_component(basis: Basis, matrix: Tensor) -> Tensor:
    """Return ``matrix`` (I - P): what of the rows lies along the protected directions, shape ``(rows, width)``.

    With the null directions stored this is M - (M V) V^T, evaluated twice: subtracting two nearly equal matrices once
    leaves rounding noise inside the null space, the second pass removes it. In the soft form every damped direction
    counts in full, whatever its weight.
    """
    if not basis.complement:
        return along(matrix, basis.vectors.to(torch.promote_types(matrix.dtype, basis.vectors.dtype)))
    rest = matrix - component(basis, matrix)
    return rest - component(basis, rest)


def project_start(basis: Basis, matrix: Tensor) -> Tensor:
    """Project an adapter's first matrix A before training and give it its old Frobenius norm back.

    B is zero at that point, so neither changes the function. Applied twice, because one pass over a matrix that lies
    mostly in the protected space leaves float32 rounding noise of that part behind.

    Args:
        basis: Of the adapter's inputs.
        matrix: A, shape ``(rank, width)``.

    Returns:
        Same shape and norm; zero where the projection leaves nothing.
    """
    projected = apply(basis, matrix)
    if basis.form == "hard":
        projected = apply(basis, projected)
    before, after = torch.linalg.vector_norm(matrix), torch.linalg.vector_norm(projected)
    return projected * torch.where(after > 0, before / after.clamp_min(torch.finfo(after.dtype).tiny), 0.0)
