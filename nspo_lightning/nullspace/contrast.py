"""Directions that safety needs and general text does not: the ``contrast`` criterion.

``auto`` cuts the eigenvectors of the general second moment C, which say nothing about what is to be learnt. With S, the
second moment of what is to be learnt from at the same inputs, directions can be ordered by what they gain for what they
cost: the eigenvectors of S v = g (C + r I) v, largest g first. The first m of them span a free space V (orthonormal).
S is that of the means of harmful prompts at the start of answers (`start_means`): at most as many directions as there
are positions are ever free. Where no starts are known it is the plain second moment of those prompts.

**What a cut costs.** A gradient step moves a layer along some b x^T, x an input of a prompt to learn from. Confined to
V it moves the output of that input by |V'x|^2 and that of general text by the mean square x'V (V'CV) V'x. Over S that
is a gain s(m) = tr(V'SV) / tr S and a cost c(m) = tr(V'SV V'CV) / (tr S tr C); the harm of a step of a given gain is
c / s^2, and what it is without projection has s = 1 and c = tr(SC) / (tr S tr C).

One multiplier serves all inputs: each frees the m with the largest s(m) - t c(m), so inputs in which safety and general
text use the same directions get few, others many; of all t the one with the least harm is taken, the means over inputs
in the place of c and s. A channel that carries no input has g = 0: it is no freedom, and stays protected.

r is a tenth of C's mean eigenvalue: of the directions that a few hundred answers' starts leave unused most are used by
the next ones. On unseen text of a 135M model directions found with a thousandth cost hundreds of times what they
promised. See docs/nullspace.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import Basis, Spectrum, Subspace, build_basis
from nspo_lightning.nullspace.criteria import NoNullDirections, RankChoice

REGULARISATION = 0.1
"""r, as a share of C's mean eigenvalue: the text at hand is too little to call a direction of less energy unused."""
_FAINT = 1e-6
"""Added to S, as a share of its mean eigenvalue: where S ends, the directions of least general energy follow."""
NEGLIGIBLE_SHARE = 1e-4
"""Share of the general energy that is no harm worth giving up freedom for."""
MOST_FREE = 0.25
"""Share of an input's directions that are looked at, and so the most that can be free (`min_null_share` raises it)."""
_LEAST_GAIN = 1e-6
"""Share of safety's energy, mean over inputs, below which nothing is learnt at all."""
_ALONE = "limited domains use what safety needs"
_MULTIPLIERS = torch.logspace(-2, 6, 161, dtype=torch.float64)
_RAISED = (0.5, 0.9, 0.99)
"""Weights of a limited domain whose best directions are looked at too; what is best in between lies near their span."""
_SAME = 1e-6
"""Sine below which a direction counts as one that is there already."""
_MOST_RAISED = 32
"""Directions that are looked at for each of these weights, at most."""


@dataclass(frozen=True, kw_only=True)
class DomainMoment:
    """What one domain's second moment C_d is in the directions of `Candidates`.

    Attributes:
        inner: V' C_d V, float64, shape ``(columns, columns)``.
        trace: tr C_d.
        unprojected: tr(S C_d) / (tr S tr C_d), what a step of gain 1 costs in this domain without projection.
    """

    inner: Tensor
    trace: float
    unprojected: float


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The directions of one input that may become free, best first.

    Attributes:
        directions: Orthonormal columns, float32, shape ``(n, columns)``; the first m span the free space of m, up to
            ``most`` of them. Further columns are what is best where limited domains weigh more, see `reordered`.
        inner: V' C V of all of them, float64, shape ``(columns, columns)``.
        learnt: V' S V / tr S, of that shape.
        values: Eigenvalues of C, descending, float64, shape ``(n,)``.
        most: Directions that may become free.
        unprojected: The cost without projection, where the gain is 1.
        tokens: Rows that C was taken over.
        domains: Domain -> its second moment.
        spare: A direction, shape ``(n,)``, that no text uses, for an input in which limited domains need what safety
            needs; None = there is always something to learn.
        spare_energy: Its v' C v.
        weights: Limited domain -> the weight it got beside C.
    """

    directions: Tensor
    inner: Tensor
    learnt: Tensor
    values: Tensor
    most: int
    unprojected: float
    tokens: int
    domains: Mapping[str, DomainMoment] = field(default_factory=dict)
    spare: Tensor | None = None
    spare_energy: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> Tensor:
        """s(1), ..., s(most)."""
        return self.learnt.diagonal()[: self.most].clamp_min(0).cumsum(0)

    @property
    def cost(self) -> Tensor:
        """c(1), ..., c(most)."""
        return self._cost(self.inner, float(self.values.sum()))

    @property
    def price(self) -> Tensor:
        """The cost by which directions are chosen: that of C, in which limited domains weigh as much as they must."""
        return self._cost(*self._weighed(self.weights))

    @property
    def energy(self) -> Tensor:
        """Share of the general energy in the first m directions, m = 1, ..., most."""
        total = max(float(self.values.sum()), torch.finfo(torch.float64).tiny)
        return (self.inner.diagonal()[: self.most].clamp_min(0) / total).cumsum(0)

    def harm(self, free: int) -> float:
        """Return what a step of a given gain costs with so many free directions, relative to one without projection."""
        cost, gain = float(self.cost[free - 1]), float(self.gain[free - 1])
        return (cost + NEGLIGIBLE_SHARE * gain) / max(gain, 1e-12) ** 2 / max(self.unprojected, 1e-12)

    def domain_cost(self, domain: str, free: int) -> float:
        """Return what such a step costs in one domain, where its gain is that of these directions."""
        of = self.domains[domain]
        return float(self._cost(of.inner, of.trace)[free - 1])

    def reordered(self, weights: Mapping[str, float]) -> Candidates:
        """Return the candidates, within the span of these columns, of C with some domains weighing more.

        Args:
            weights: Domain -> w_d; C has the rest, 1 - sum w_d.
        """
        inner, trace = self._weighed(weights)
        floor, faint = _floors(trace, 1.0, len(self.values))
        factor, _, vectors = _whitened(inner, self.learnt, floor, torch.full_like(inner.diagonal(), faint))
        turn = _directions(factor, vectors, self.most)

        def turned(moment: Tensor) -> Tensor:
            return turn.mT @ moment @ turn

        return replace(
            self,
            directions=(self.directions.to(turn.dtype) @ turn).to(self.directions.dtype),
            inner=turned(self.inner),
            learnt=turned(self.learnt),
            domains={name: replace(of, inner=turned(of.inner)) for name, of in self.domains.items()},
            weights=dict(weights),
        )

    def _weighed(self, weights: Mapping[str, float]) -> tuple[Tensor, float]:
        """Return V' C_w V and tr C_w."""
        rest = 1 - sum(weights.values())
        inner, trace = rest * self.inner, rest * float(self.values.sum())
        for name, weight in weights.items():
            inner, trace = inner + weight * self.domains[name].inner, trace + weight * self.domains[name].trace
        return inner, trace

    def _cost(self, inner: Tensor, trace: float) -> Tensor:
        part = (inner * self.learnt)[: self.most, : self.most]
        return part.cumsum(0).cumsum(1).diagonal().clamp_min(0) / max(trace, torch.finfo(torch.float64).tiny)


def candidates(
    general: Tensor,
    to_learn: Tensor,
    *,
    tokens: int,
    most_free: float = MOST_FREE,
    least_free: float = 0.0,
    domains: Mapping[str, Tensor] | None = None,
    limited: Iterable[str] = (),
) -> Candidates:
    """Order the directions of one input by what they gain for what they cost.

    Args:
        general: C, symmetric, positive semi-definite, shape ``(n, n)``.
        to_learn: S, the same of the prompts that are trained on.
        tokens: Rows that C was taken over.
        most_free: Share of the directions that are kept at most; those that S has, if these are fewer.
        least_free: Share that is kept all the same.
        domains: Domain -> C_d, for what is promised in each.
        limited: Those that may weigh more than they do in C.

    Returns:
        On the CPU; computed in float64, where the moments are.

    Raises:
        ValueError: If the prompts that are trained on bring no energy.
    """
    c, s = (_symmetric(moment) for moment in (general, to_learn))
    total, learnt, n = float(c.trace()), float(s.trace()), len(c)
    if not learnt > 0:
        raise ValueError("The prompts that are trained on bring no energy to a layer's input.")
    _, faint = _floors(total, learnt, n)
    live = ((c.diagonal() > 0) | (s.diagonal() > 0)).to(c.dtype)  # where S ends, no dead channel follows
    least = max(math.ceil(least_free * n), 1)
    kept = _ordered(c, s, faint * live, min(math.ceil(most_free * n), n - 1), least)
    most, tiny = kept.shape[1], torch.finfo(c.dtype).tiny
    own = domains or {}
    for name, weight in ((name, weight) for name in limited for weight in _RAISED):
        few = min(most, _MOST_RAISED)
        kept = _joined(kept, _ordered(torch.lerp(c, _symmetric(own[name]), weight), s, faint * live, few, few))
    spare = _unused(c, [s, *own.values()]) if limited else None
    return Candidates(
        directions=kept.to(torch.float32).cpu(),
        inner=(kept.mT @ c @ kept).cpu(),
        learnt=(kept.mT @ s @ kept / learnt).cpu(),
        values=torch.linalg.eigvalsh(c).flip(0).clamp_min(0).cpu(),
        most=most,
        unprojected=float((s * c).sum() / (learnt * max(total, tiny))),
        tokens=tokens,
        domains={name: _of_domain(moment, kept, s, learnt) for name, moment in own.items()},
        spare=None if spare is None else spare.to(torch.float32).cpu(),
        spare_energy=0.0 if spare is None else max(float(spare @ c @ spare), 0.0),
    )


def _ordered(c: Tensor, s: Tensor, faint: Tensor, most: int, least: int) -> Tensor:
    """Return the first directions by gain over cost: as many as S has, in these bounds."""
    floor, _ = _floors(float(c.trace()), 1.0, len(c))
    factor, found, vectors = _whitened(c, s, floor, faint)
    rank = int((found > 2 * float(faint.max()) / floor).sum())  # what was added alone reaches half of that
    return _directions(factor, vectors, max(min(most, rank), least))


def _of_domain(moment: Tensor, directions: Tensor, to_learn: Tensor, learnt: float) -> DomainMoment:
    """Return what a domain's moment is in some directions; ``to_learn`` is S, ``learnt`` its trace."""
    moment = moment.to(directions.dtype)
    trace, tiny = float(moment.trace()), torch.finfo(moment.dtype).tiny
    return DomainMoment(
        inner=_symmetric(directions.mT @ moment @ directions).cpu(),
        trace=trace,
        unprojected=float(to_learn.flatten() @ moment.flatten()) / (learnt * max(trace, tiny)),
    )


def _unused(first: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Return the direction of the least energy in all these moments together, each with trace 1."""
    tiny = torch.finfo(first.dtype).tiny
    energy = first / first.trace().clamp_min(tiny)
    for moment in others:
        energy.add_(moment.to(first.dtype), alpha=1 / max(float(moment.trace()), tiny))
    unused: Tensor = torch.linalg.eigh(energy)[1][:, 0]
    return unused


def _floors(total: float, learnt: float, width: int) -> tuple[float, float]:
    """Return r, and what is added to S, from the traces of C and S."""
    return (REGULARISATION * total / width if total > 0 else 1.0), _FAINT * learnt / width


def _whitened(c: Tensor, s: Tensor, floor: float, faint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor of C + r I, and the eigenpairs of S + diag(faint) whitened by it, ascending."""
    one = torch.eye(len(c), dtype=c.dtype, device=c.device)
    factor = torch.linalg.cholesky(c + floor * one)
    half = torch.linalg.solve_triangular(factor, s + faint.diag(), upper=False)
    found, vectors = torch.linalg.eigh(_symmetric(torch.linalg.solve_triangular(factor, half.mT, upper=False)))
    return factor, found, vectors


def _directions(factor: Tensor, vectors: Tensor, count: int) -> Tensor:
    """Return the first generalised eigenvectors; QR keeps the span of each first m columns."""
    ordered = torch.linalg.solve_triangular(factor.mT, vectors.flip(1)[:, :count], upper=True)
    kept: Tensor = torch.linalg.qr(ordered / torch.linalg.vector_norm(ordered, dim=0)).Q
    return kept


def _joined(kept: Tensor, more: Tensor) -> Tensor:
    """Return orthonormal columns with more behind them, without what these hold already."""
    for _ in range(2):
        more = more - kept @ (kept.mT @ more)
    left, sizes, _ = torch.linalg.svd(more, full_matrices=False)
    return torch.cat([kept, left[:, sizes > _SAME]], 1)


def choose_free(
    found: Mapping[str, Candidates], *, min_null_share: float = 0.0, max_output_change: float | None = None
) -> dict[str, RankChoice]:
    """Choose how many directions of each input are free, with one multiplier for all.

    Args:
        found: Input -> its candidates.
        min_null_share: At least this share of each input's directions stays free.
        max_output_change: The free directions of an input hold at most the square of it of its general energy.

    Returns:
        Input -> choice; ``gain`` is the predicted harm in that input, 1 without projection.

    Raises:
        NoNullDirections: If the two limits contradict each other.
    """
    bounds = {name: _bounds(name, of, min_null_share, max_output_change) for name, of in found.items()}
    counts = {name: _counts(of, *bounds[name]) for name, of in found.items()}
    cost = torch.stack([_from_none(of.price)[counts[name]] for name, of in found.items()]).mean(0)
    gain = torch.stack([_from_none(of.gain)[counts[name]] for name, of in found.items()]).mean(0)
    harm = (cost + NEGLIGIBLE_SHARE * gain) / gain.clamp_min(1e-12).square()
    harm[gain < _LEAST_GAIN] = math.inf
    best = int(harm.argmin())
    choices = {}
    for name, of in found.items():
        n, free = len(of.values), int(counts[name][best])
        if free == 0:
            choices[name] = RankChoice(
                protected=n - 1,
                energy_left=of.spare_energy / max(float(of.values.sum()), 1e-300),
                null_share=1 / n,
                gain=0.0,
                spare=True,
                reason=f"left alone: {_ALONE}",
            )
            continue
        least, most = bounds[name]
        held = ", held by min_null_share" if free == least > 1 and min_null_share > 0 else ""
        if free == most < of.most:
            held = ", held by max_output_change"
        choices[name] = RankChoice(
            protected=n - free,
            energy_left=float(of.energy[free - 1]),
            null_share=free / n,
            gain=of.harm(free),
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
    if choice.spare:
        assert of.spare is not None  # what was chosen
        directions, inner = of.spare[:, None], torch.tensor([[of.spare_energy]], dtype=torch.float64)
    else:
        directions, inner = of.directions[:, :free], of.inner[:free, :free]
    energies, rotation = torch.linalg.eigh(_symmetric(inner))
    vectors = (directions.to(torch.float64) @ rotation.flip(1)).to(torch.float32).contiguous()
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
    most = of.most
    least = max(math.ceil(min_null_share * n), 1)
    if max_output_change is not None:
        most = min(most, int((of.energy.sqrt() <= max_output_change).sum()))
    if least > most:
        raise NoNullDirections(
            f"{name}: no cut leaves {least} of {n} directions free and moves general outputs by at most "
            f"{max_output_change}. Relax one of the two."
        )
    return least, most


def _counts(of: Candidates, least: int, most: int) -> Tensor:
    """Return the number of free directions of an input for each multiplier."""
    value = of.gain[least - 1 : most] - _MULTIPLIERS[:, None] * of.price[least - 1 : most]
    best, counts = value.max(1)
    counts = counts + least
    return counts if of.spare is None or least > 1 else torch.where(best > 0, counts, 0)


def _from_none(values: Tensor) -> Tensor:
    """Return values for 0, 1, ... free directions from those for 1, 2, ..."""
    return torch.cat([values.new_zeros(1), values])


def _symmetric(moment: Tensor) -> Tensor:
    moment = moment.to(torch.float64)
    return (moment + moment.mT) / 2
