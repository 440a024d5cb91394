"""What a basis and an update amount to: leaks, bounds on the change of outputs, and the calibration table.

D is a layer's update: s B A for an adapter, W - W_ref for a full weight. Everything about s B A is computed from the
thin factors in float64, never from the product: ||B X||_F^2 = tr(X^T (B^T B) X).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.projection import protected_component

NormFunction = Callable[[Tensor], float]


@dataclass(frozen=True, kw_only=True)
class LayerCertificate:
    """How far a layer's update stays out of what is protected."""

    name: str
    leak: float
    """||D U_k||_F / ||D||_F; 0 for D = 0. In the soft form U_k are the damped directions."""
    update_norm: float
    """||D||_F."""
    output_change: float
    """Upper bound of the root mean square change of the layer's outputs on the rows of any calibration domain (and of
    any mixture of them), relative to the outputs' own root mean square there (to the inputs' where no output energy was
    measured)."""
    protected: int
    null_dims: int


def low_rank_norm(up: Tensor, down: Tensor, experts: int = 1) -> float:
    """Return ||B A||_F from its factors, B of shape ``(out, r)`` and A of shape ``(r, width)``, in float64.

    Of several experts it is the norm of all their products together; see `ProtectedLayer.experts`.
    """
    ups = up.to(torch.float64).reshape(len(up), -1, experts).permute(2, 0, 1)
    downs = down.to(torch.float64).reshape(experts, -1, down.shape[-1])
    return math.sqrt(max(float((((ups.mT @ ups) @ downs) * downs).sum()), 0.0))


def certify(
    name: str,
    basis: Basis,
    update: Tensor,
    *,
    up: Tensor | None = None,
    scale: float = 1.0,
    experts: int = 1,
    output_energy: float | None = None,
) -> LayerCertificate:
    """Measure one layer's update against its basis.

    Args:
        name: The layer.
        basis: Of its inputs, on the update's device.
        update: A of an adapter, shape ``(r, width)``, or W - W_ref, shape ``(out, width)``.
        up: B of the adapter, shape ``(out, r)``; None for a full weight.
        scale: The adapter's factor s.
        experts: See `ProtectedLayer.experts`.
        output_energy: What the squared change is measured against, see `Calibration.output_energy`.

    Returns:
        The certificate. Its bound adds the exact share of the stored directions to ||D_rest||^2 times the largest
        energy among the others. It is over the second moment C = sum_d w_d C_d of the domains d; since C_d <= C / w_d,
        dividing by the least w_d E_d (E_d the outputs' energy in d) bounds the relative change in each domain.
    """
    update = update.to(torch.float64)

    def norm(matrix: Tensor) -> float:
        return scale * low_rank_norm(up, matrix, experts) if up is not None else float(torch.linalg.vector_norm(matrix))

    total = norm(update)
    inside = protected_component(basis, update)
    leak = norm(inside) / total if total > 0 else 0.0
    change = _output_change(basis, update, inside, norm)
    reference = output_energy if output_energy else basis.energy
    return LayerCertificate(
        name=name,
        leak=leak,
        update_norm=total,
        output_change=math.sqrt(change / reference) if reference > 0 else 0.0,
        protected=basis.protected,
        null_dims=basis.null_dims,
    )


def _output_change(basis: Basis, update: Tensor, inside: Tensor, norm: NormFunction) -> float:
    """Return a bound of tr(D C D^T): exact along stored directions, largest other energy times norm elsewhere."""
    if basis.subspace != "null":
        return norm(update) ** 2 * basis.largest_energy
    k, stored = basis.protected, basis.vectors.shape[1]
    vectors = basis.vectors.to(torch.float64)
    values = basis.values.to(vectors.device)
    mine = values[k : k + stored] if basis.complement else values[:stored]
    others = values[:k] if basis.complement else values[stored:]
    along = norm((update @ vectors) * mine.sqrt()) ** 2
    rest = inside if basis.complement else update - inside
    largest = (float(others[0]) if others.numel() else 0.0) + basis.outside
    elsewhere = norm(rest) ** 2 * largest
    if basis.outside == 0 and not basis.oblique:  # eigenvectors: no energy is shared between the two parts
        return along + elsewhere
    along += norm(update @ vectors) ** 2 * basis.outside
    return (math.sqrt(along) + math.sqrt(elsewhere)) ** 2


def table_rows(calibration: Calibration) -> list[dict[str, str]]:
    """Return the calibration table: one row for each distinct input, heading -> cell."""
    rows = []
    prefix = common_parent(calibration.layer_names())
    for first, basis in calibration.bases.items():
        names = [name.removeprefix(prefix) for name in calibration.groups[first]]
        rows.append({
            "layer": joint_name(names),
            "width": str(basis.width),
            "protected": str(basis.protected),
            "null": f"{basis.null_dims} ({100 * basis.null_dims / basis.width:.0f} %)",
            "energy left": f"{basis.choice.energy_left:.2g}",
            "condition": f"{basis.condition:.2g}",
            "why": basis.choice.reason + (" (fewer tokens than width)" if basis.tokens < basis.width else ""),
        })
    return rows


def joint_name(names: Iterable[str]) -> str:
    """Return one name for a group of layers: ``layers.0.self_attn.{q_proj,k_proj,v_proj}``."""
    names = list(names)
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return ", ".join(names)
    parent = parents.pop()
    return (parent + "." if parent else "") + "{" + ",".join(name.rpartition(".")[2] for name in names) + "}"


def common_parent(names: Iterable[str]) -> str:
    """Return the dotted prefix that all names share (``policy.model.layers.``), empty where there is none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return "".join(f"{column[0]}." for column in shared)
