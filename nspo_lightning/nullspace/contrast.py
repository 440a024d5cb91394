"""Directions that safety needs and general text does not: the ``contrast`` criterion.

``auto`` cuts the eigenvectors of the general second moment C, which say nothing about what is to be learnt. With S, the
second moment of the same inputs over the prompts that are trained on, directions can be ordered by what they gain for
what they cost: the eigenvectors of S v = g (C + r I) v, largest g first. The first m of them span a free space V
(orthonormal), in which an update meets

    e(m) = tr(V' C V) / tr C  of the general energy,    s(m) = tr(V' S V) / tr S  of the energy to be learnt from.

One multiplier serves all inputs: each frees the m with the largest s(m) - t e(m). Inputs in which safety and general
text use the same directions so get few, others many. An update that is to gain a fixed first-order improvement must be
1 / sqrt(S) times as long as a free one, S the mean of s over inputs, and changes general outputs by the mean E of e for
its squared length: of all t the one with the least E / S^2 is taken. A channel that carries no input has g = 0: it is
no freedom, and stays protected. See docs/nullspace.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import Basis, Spectrum, Subspace, build_basis
from nspo_lightning.nullspace.criteria import NoNullDirections, RankChoice

REGULARISATION = 1e-3
"""r, as a share of C's mean eigenvalue: the text at hand is too little to call a direction of less energy unused."""
NEGLIGIBLE_SHARE = 1e-4
"""Share of the general energy that is no harm worth giving up freedom for."""
MOST_FREE = 0.25
"""Share of an input's directions that are looked at, and so the most that can be free (`min_null_share` raises it)."""
_MULTIPLIERS = torch.logspace(-2, 6, 161, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The directions of one input that may become free, best first.

    Attributes:
        directions: Orthonormal columns, float32, shape ``(n, most)``; the first m span the free space of m.
        inner: V' C V of all of them, float64, shape ``(most, most)``.
        values: Eigenvalues of C, descending, float64, shape ``(n,)``.
        cost: e(1), ..., e(most).
        gain: s(1), ..., s(most).
        tokens: Rows that C was taken over.
    """

    directions: Tensor
    inner: Tensor
    values: Tensor
    cost: Tensor
    gain: Tensor
    tokens: int


def candidates(general: Tensor, to_learn: Tensor, *, tokens: int, most_free: float = MOST_FREE) -> Candidates:
    """Order the directions of one input by what they gain for what they cost.

    Args:
        general: C, symmetric, positive semi-definite, shape ``(n, n)``.
        to_learn: S, the same of the prompts that are trained on.
        tokens: Rows that C was taken over.
        most_free: Share of the directions that are kept.

    Returns:
        On the CPU; computed in float64, where the moments are.

    Raises:
        ValueError: If the prompts that are trained on bring no energy.
    """
    c, s = (_symmetric(moment) for moment in (general, to_learn))
    total, learnt, n = float(c.trace()), float(s.trace()), len(c)
    if not learnt > 0:
        raise ValueError("The prompts that are trained on bring no energy to a layer's input.")
    floor = REGULARISATION * total / n if total > 0 else 1.0
    factor = torch.linalg.cholesky(c + floor * torch.eye(n, dtype=c.dtype, device=c.device))
    half = torch.linalg.solve_triangular(factor, s, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    _, vectors = torch.linalg.eigh(_symmetric(whitened))
    most = max(min(math.ceil(most_free * n), n - 1), 1)
    ordered = torch.linalg.solve_triangular(factor.mT, vectors.flip(1)[:, :most], upper=True)
    # QR keeps the span of each first m columns.
    kept = torch.linalg.qr(ordered / torch.linalg.vector_norm(ordered, dim=0)).Q
    inner = kept.mT @ c @ kept
    gain = ((s @ kept) * kept).sum(0).clamp_min(0) / learnt
    return Candidates(
        directions=kept.to(torch.float32).cpu(),
        inner=inner.cpu(),
        values=torch.linalg.eigvalsh(c).flip(0).clamp_min(0).cpu(),
        cost=(inner.diagonal().clamp_min(0) / max(total, torch.finfo(c.dtype).tiny)).cumsum(0).cpu(),
        gain=gain.cumsum(0).cpu(),
        tokens=tokens,
    )


def choose_free(
    found: Mapping[str, Candidates], *, min_null_share: float = 0.0, max_output_change: float | None = None
) -> dict[str, RankChoice]:
    """Choose how many directions of each input are free, with one multiplier for all.

    Args:
        found: Input -> its candidates.
        min_null_share: At least this share of each input's directions stays free.
        max_output_change: The free directions of an input hold at most the square of it of its general energy.

    Returns:
        Input -> choice; ``gain`` is the predicted harm E / S^2 of them all.

    Raises:
        NoNullDirections: If the two limits contradict each other.
    """
    bounds = {name: _bounds(name, of, min_null_share, max_output_change) for name, of in found.items()}
    counts = {name: _counts(of, *bounds[name]) for name, of in found.items()}
    cost = torch.stack([of.cost[counts[name] - 1] for name, of in found.items()]).mean(0)
    gain = torch.stack([of.gain[counts[name] - 1] for name, of in found.items()]).mean(0)
    harm = (cost + NEGLIGIBLE_SHARE) / gain.clamp_min(1e-12).square()
    best = int(harm.argmin())
    choices = {}
    for name, of in found.items():
        n, free = len(of.values), int(counts[name][best])
        least, most = bounds[name]
        held = ", held by min_null_share" if free == least > 1 else ""
        if free == most:
            held = ", the most that was looked at" if max_output_change is None else ", held by max_output_change"
        choices[name] = RankChoice(
            protected=n - free,
            energy_left=float(of.cost[free - 1]),
            null_share=free / n,
            gain=float(harm[best]),
            reason=f"{100 * float(of.gain[free - 1]):.1f} % of safety's energy{held}",
        )
    return choices


def contrast_basis(of: Candidates, choice: RankChoice, *, subspace: Subspace = "null", seed: int = 0) -> Basis:
    """Return the basis whose free space is the first of the candidates' directions; see `build_basis`.

    Inside it the directions are turned so that C is diagonal. Its ``values`` are C's own largest, for the protected
    part, then the energies of the free directions.
    """
    n, free = len(of.values), len(of.values) - choice.protected
    if subspace == "random":
        nothing = Spectrum(values=of.values, vectors=torch.empty(n, 0), tokens=of.tokens)
        return build_basis(nothing, choice, subspace=subspace, seed=seed)
    energies, rotation = torch.linalg.eigh(_symmetric(of.inner[:free, :free]))
    vectors = (of.directions[:, :free].to(torch.float64) @ rotation.flip(1)).to(torch.float32).contiguous()
    energies = energies.flip(0).clamp_min(0)
    basis = Basis(
        vectors=vectors,
        complement=True,
        values=torch.cat([of.values[: n - free], energies]),
        choice=choice,
        tokens=of.tokens,
        oblique=True,
        trace=float(of.values.sum()),
    )
    if subspace == "null":
        return basis
    turned = replace(choice, protected=free, null_share=(n - free) / n)
    values = torch.cat([energies, of.values[: n - free]])
    return replace(basis, complement=False, values=values, choice=turned, subspace=subspace)


def _bounds(name: str, of: Candidates, min_null_share: float, max_output_change: float | None) -> tuple[int, int]:
    """Return the least and the most directions of an input that may be free."""
    n = len(of.values)
    least, most = max(math.ceil(min_null_share * n), 1), len(of.cost)
    if max_output_change is not None:
        most = min(most, int((of.cost.sqrt() <= max_output_change).sum()))
    if least > most:
        raise NoNullDirections(
            f"{name}: no cut leaves {least} of {n} directions free and moves general outputs by at most "
            f"{max_output_change}. Relax one of the two."
        )
    return least, most


def _counts(of: Candidates, least: int, most: int) -> Tensor:
    """Return the number of free directions of an input for each multiplier."""
    value = of.gain[least - 1 : most] - _MULTIPLIERS[:, None] * of.cost[least - 1 : most]
    return least + value.argmax(1)


def _symmetric(moment: Tensor) -> Tensor:
    moment = moment.to(torch.float64)
    return (moment + moment.mT) / 2
