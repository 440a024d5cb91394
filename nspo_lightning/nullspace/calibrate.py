"""From forward passes to bases: the whole calibration, without any framework.

    calls -> moments by input and domain -> (sum over ranks) -> one moment by input -> spectrum -> k -> basis

Under a memory budget the inputs are spread over several passes; a single input too wide for the budget is sketched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning.nullspace import ranks
from nspo_lightning.nullspace.basis import (
    Basis,
    Form,
    Spectrum,
    Subspace,
    build_basis,
    build_soft_basis,
    choose_ranks,
    decompose,
)
from nspo_lightning.nullspace.collect import InputCollector, RepeatBatch
from nspo_lightning.nullspace.criteria import Criterion, RankChoice, check_threshold, choose_rank, energy_left
from nspo_lightning.nullspace.domains import combine
from nspo_lightning.nullspace.sketch import RangeSketch, sketch_columns, sketch_spectrum


@dataclass(frozen=True, kw_only=True)
class ForwardCall:
    """One calibration batch, ready to run."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    """True (non-zero) = this row's inputs count."""
    domains: Sequence[str] | None = None
    """Domain of each sample."""


@dataclass(frozen=True, kw_only=True)
class BasisSettings:
    """What decides a basis, given the moments."""

    criterion: Criterion = "auto"
    threshold: float | None = None
    form: Form = "hard"
    softness: float = 0.01
    subspace: Subspace = "null"
    min_null_share: float = 0.0
    max_output_change: float | None = None
    domain_weights: Mapping[str, float] | None = None
    without_domains: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_threshold(self.criterion, self.threshold)
        for name, allowed in (("form", ("hard", "soft")), ("subspace", ("null", "random", "protected"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 0 <= self.min_null_share < 1:
            raise ValueError(f"`min_null_share` must lie in [0, 1), got {self.min_null_share}.")
        if not self.softness > 0:
            raise ValueError(f"`softness` must be positive, got {self.softness}.")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for fingerprints and files."""
        values = dict(vars(self))
        values["domain_weights"] = dict(self.domain_weights) if self.domain_weights else None
        values["without_domains"] = list(self.without_domains)
        return values


@dataclass(kw_only=True)
class Calibration:
    """Bases for a model's layers, and what they were made from."""

    bases: dict[str, Basis]
    """First layer of each input -> basis."""
    groups: dict[str, list[str]]
    """First layer of each input -> all layers that read it."""
    settings: BasisSettings
    output_energy: dict[str, float] = field(default_factory=dict)
    """Layer -> mean squared norm of its outputs on calibration rows."""
    domain_tokens: dict[str, int] = field(default_factory=dict)
    """Domain -> rows that counted."""
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Input -> domain -> second moment, where they were kept."""
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def basis_of(self, layer: str) -> Basis:
        """Return the basis of a layer by its name.

        Raises:
            KeyError: if the layer was not calibrated.
        """
        for first, names in self.groups.items():
            if layer in names:
                return self.bases[first]
        raise KeyError(f"No basis for layer {layer!r}; calibrated layers: {sorted(self.layer_names())[:8]} ...")

    def layer_names(self) -> set[str]:
        """Return the names of all calibrated layers."""
        return {name for names in self.groups.values() for name in names}

    def recombined(self, settings: BasisSettings) -> Calibration:
        """Return bases for other settings (another criterion, a domain left out) from the kept moments.

        Args:
            settings: the new settings.

        Returns:
            A new calibration, without a second pass over the data.

        Raises:
            ValueError: if the moments were not kept.
        """
        if set(self.moments) != set(self.bases):
            raise ValueError("The moments of this calibration were not kept. Calibrate with `keep_moments=True`.")
        spectra = {}
        for name, by_domain in self.moments.items():
            tokens = sum(n for d, n in self.domain_tokens.items() if d not in settings.without_domains)
            mean = combine(by_domain, settings.domain_weights, without=settings.without_domains)
            spectra[name] = decompose(mean, tokens=tokens, resolution=torch.finfo(torch.float32).eps)
        bases = bases_from_spectra(spectra, settings)
        return Calibration(
            bases=bases,
            groups=self.groups,
            settings=settings,
            output_energy=self.output_energy,
            domain_tokens=self.domain_tokens,
            moments=self.moments,
            fingerprint=self.fingerprint | {"settings": settings.as_dict()},
        )


def bases_from_spectra(spectra: Mapping[str, Spectrum], settings: BasisSettings) -> dict[str, Basis]:
    """Decide k for each spectrum and build the bases.

    Args:
        spectra: input -> eigenpairs.
        settings: criterion and form.

    Returns:
        input -> basis.

    Raises:
        NoNullDirections: naming every input that keeps no null direction.
    """
    bases = {name: _basis(index, spectrum, settings) for index, (name, spectrum) in enumerate(spectra.items())}
    _refuse_empty(bases, {name: s.values for name, s in spectra.items()}, settings)
    return {name: basis for name, basis in bases.items() if basis is not None}


def _basis(index: int, spectrum: Spectrum, settings: BasisSettings) -> Basis | None:
    if settings.form == "soft":
        return build_soft_basis(spectrum, settings.softness)
    choice = choose_rank(
        spectrum.values,
        settings.criterion,
        settings.threshold,
        min_null_share=settings.min_null_share,
        max_output_change=settings.max_output_change,
    )
    if choice.protected >= spectrum.values.numel():
        return None
    available = spectrum.vectors.shape[1]
    if choice.protected > available:  # a sketch holds no more directions: protect those, and say so
        left = float(energy_left(spectrum.values)[available])
        share = 1 - available / spectrum.values.numel()
        reason = f"{choice.reason}; held by the sketch's {available} columns"
        choice = RankChoice(
            protected=available, energy_left=left, null_share=share, gain=left / share**2, reason=reason
        )
    return build_basis(spectrum, choice, subspace=settings.subspace, seed=settings.seed + index)


def _refuse_empty(bases: Mapping[str, Basis | None], values: Mapping[str, Tensor], settings: BasisSettings) -> None:
    if settings.form == "hard":
        choose_ranks(
            values,
            settings.criterion,
            settings.threshold,
            min_null_share=settings.min_null_share,
            max_output_change=settings.max_output_change,
        )


@torch.no_grad()
def calibrate_modules(
    modules: Mapping[str, nn.Module],
    forward: Callable[..., Any],
    calls: Callable[[], Iterable[ForwardCall]],
    settings: BasisSettings,
    *,
    memory_budget_gb: float | None = None,
    keep_moments: bool = False,
    product_dtype: torch.dtype | None = None,
    sharded: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Calibration:
    """Run calibration text through a model and build a basis for each distinct layer input.

    Args:
        modules: layer name -> module whose input is protected.
        forward: called with each batch's arguments; under no_grad, the caller sets eval mode and precision.
        calls: returns the batches, anew for each pass.
        settings: what decides the bases.
        memory_budget_gb: limit for moments and sketches at one time, on each rank; None = one pass.
        keep_moments: keep the second moments by domain (on the CPU, float32), for `Calibration.recombined`.
        product_dtype: see `SecondMoment`.
        sharded: each rank's ``calls`` yield different batches already; else rank r takes every world-th one.
        progress: called with (stage, batches or layers done).

    Returns:
        The calibration, the same on every rank.

    Raises:
        ValueError: if there are no batches, no rows that count, or layers that were never called.
    """
    report = progress or (lambda *_: None)
    result = Calibration(bases={}, groups={}, settings=settings)
    bases: dict[str, Basis | None] = {}
    values: dict[str, Tensor] = {}
    for job in _passes(modules, forward, calls, memory_budget_gb, report):
        make = None
        if job.sketch_columns:
            columns = job.sketch_columns
            make = lambda name, width: RangeSketch(width, columns, seed=settings.seed)  # noqa: E731
        collector = InputCollector(
            modules, product_dtype=product_dtype, groups=job.groups, only=job.only, make_moment=make
        )
        _run(collector, forward, calls, sharded=sharded, report=report)
        _check_called(collector, modules)
        result.groups |= {k: v for k, v in collector.groups.items() if job.only is None or k in job.only}
        _reduce_output_energy(collector, result)
        for index, first in enumerate(n for n in collector.groups if job.only is None or n in job.only):
            report("layers", index + 1)
            by_domain = _reduced(collector, first)
            tokens = {domain: m.rows for domain, m in by_domain.items()}
            result.domain_tokens = {d: max(n, result.domain_tokens.get(d, 0)) for d, n in tokens.items()}
            if sum(tokens.values()) == 0:
                raise ValueError(f"No calibration row counted for {first}: every mask entry was False.")
            if job.sketch_columns:
                spectrum = _second_sketch_pass(
                    first, modules, by_domain, forward, calls, settings, sharded, job, report
                )
            else:
                moments = {domain: m.second_moment() for domain, m in by_domain.items()}
                mean = combine(moments, _weights(settings, moments), without=settings.without_domains)
                resolution = max(m.resolution for m in by_domain.values())
                spectrum = _decompose_on_owner(mean, len(values), sum(tokens.values()), resolution)
                if keep_moments:
                    result.moments[first] = {d: m.to(device="cpu", dtype=torch.float32) for d, m in moments.items()}
            values[first] = spectrum.values
            bases[first] = _basis(len(bases), spectrum, settings)
            collector.moments.pop(first, None)
    _refuse_empty(bases, values, settings)
    result.bases = {name: basis for name, basis in bases.items() if basis is not None}
    return result


@dataclass(frozen=True, kw_only=True)
class _Pass:
    groups: Mapping[str, Sequence[str]] | None = None
    only: Sequence[str] | None = None
    sketch_columns: int = 0


def _passes(
    modules: Mapping[str, nn.Module],
    forward: Callable[..., Any],
    calls: Callable[[], Iterable[ForwardCall]],
    memory_budget_gb: float | None,
    report: Callable[[str, int], None],
) -> Iterator[_Pass]:
    if memory_budget_gb is None:
        yield _Pass()
        return
    collector = InputCollector(modules)
    domains: set[str] = {"general"}
    first_call = None
    for call in calls():
        first_call = first_call or call
        domains |= set(call.domains or ())
    if first_call is None:
        raise ValueError(
            "Calibration got no batches. Check `calibration` or the datamodule's `calibration_dataloader()`."
        )
    count = max(len(domains) - 1, 1)
    with collector:
        collector.begin(counting=False)
        forward(*first_call.args, **first_call.kwargs)
        collector.end()
    budget = memory_budget_gb * 1e9
    current: list[str] = []
    used = 0.0
    wide: list[tuple[str, int]] = []
    for first in collector.groups:
        width = _width(modules[first])
        sums = 8.0 if width <= 8192 else 4.0
        # A running sum for each domain, one product and one block of gathered rows; then the eigenvectors' workspace.
        need, workspace = width * width * (sums * count + 8.0), width * width * 24.0
        if need + workspace > budget:
            wide.append((first, width))
            continue
        if current and used + need + workspace > budget:
            yield _Pass(groups=collector.groups, only=tuple(current))
            current, used = [], 0.0
        current.append(first)
        used += need
    if current:
        yield _Pass(groups=collector.groups, only=tuple(current))
    for first, width in wide:
        columns = sketch_columns(width, budget)
        yield _Pass(groups=collector.groups, only=(first,), sketch_columns=columns)


def _run(
    collector: InputCollector,
    forward: Callable[..., Any],
    calls: Callable[[], Iterable[ForwardCall]],
    *,
    sharded: bool,
    report: Callable[[str, int], None],
) -> None:
    done = 0
    with collector:
        for call, counting in _shard(calls(), sharded):
            for attempt in range(2):
                collector.begin(call.mask, call.domains, counting=counting)
                forward(*call.args, **call.kwargs)
                try:
                    collector.end()
                except RepeatBatch:
                    if attempt:
                        raise
                    continue
                break
            done += 1
            report("batches", done)
    if done == 0:
        raise ValueError(
            "Calibration got no batches. Check `calibration` or the datamodule's `calibration_dataloader()`."
        )


def _shard(calls: Iterable[ForwardCall], sharded: bool) -> Iterator[tuple[ForwardCall, bool]]:
    """Yield this rank's batches; all ranks run equally many, since a sharded model's forward is a collective."""
    world, mine = (1, 0) if sharded else (ranks.world_size(), ranks.rank())
    window: list[ForwardCall] = []
    for call in calls:
        window.append(call)
        if len(window) == world:
            yield window[mine], True
            window = []
    if window:
        yield (window[mine], True) if mine < len(window) else (window[0], False)


def _check_called(collector: InputCollector, modules: Mapping[str, nn.Module]) -> None:
    silent = collector.silent()
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(modules)} layers saw no input during calibration, so nothing can protect them: "
            f"{', '.join(silent[:5])}{' ...' if len(silent) > 5 else ''}. Their weights are used without calling the "
            "module (as torch.nn.MultiheadAttention does), or the text never reaches them. Freeze them, or leave them out."
        )


def _reduced(collector: InputCollector, first: str) -> dict[str, Any]:
    """Sum an input's accumulators over ranks; a domain that this rank did not see counts as zeros."""
    local = collector.moments.get(first, {})
    if ranks.world_size() == 1:
        return local
    described = ranks.gather_objects({domain: moment.width for domain, moment in local.items()})
    domains = {d: width for names in described for d, width in names.items()}
    reduced = {}
    for domain in sorted(domains):
        moment = local.get(domain) or collector.new_moment(first, domains[domain])
        moment.all_reduce(ranks.all_reduce_sum)
        reduced[domain] = moment
    return reduced


def _reduce_output_energy(collector: InputCollector, result: Calibration) -> None:
    for name, energy in collector.output_energy.items():
        pair = torch.tensor([float(energy.total), float(energy.rows)], dtype=torch.float64)
        total, rows = ranks.all_reduce_sum(pair).tolist()
        result.output_energy[name] = total / max(rows, 1)


def _weights(settings: BasisSettings, moments: Mapping[str, Tensor]) -> Mapping[str, float] | None:
    return settings.domain_weights


def _decompose_on_owner(moment: Tensor, index: int, tokens: int, resolution: float) -> Spectrum:
    """Diagonalise on one rank, so that all ranks hold the same vectors even where eigenvalues coincide."""
    if ranks.world_size() == 1:
        return decompose(moment, tokens=tokens, resolution=resolution)
    owner = index % ranks.world_size()
    if ranks.rank() == owner:
        spectrum = decompose(moment, tokens=tokens, resolution=resolution)
        values, vectors = spectrum.values, spectrum.vectors
    else:
        values, vectors = torch.zeros(moment.shape[0], dtype=torch.float64), torch.zeros_like(moment)
    dtype = ranks.broadcast_object(vectors.dtype, owner)
    values = ranks.broadcast_tensor(values, owner)
    vectors = ranks.broadcast_tensor(vectors.to(dtype), owner)
    return Spectrum(values=values, vectors=vectors, tokens=tokens, resolution=resolution)


def _second_sketch_pass(
    first: str,
    modules: Mapping[str, nn.Module],
    by_domain: Mapping[str, Any],
    forward: Callable[..., Any],
    calls: Callable[[], Iterable[ForwardCall]],
    settings: BasisSettings,
    sharded: bool,
    job: _Pass,
    report: Callable[[str, int], None],
) -> Spectrum:
    """Measure the energies inside the sketched range exactly, by a second pass over the text."""
    shares = {d: w for d, w in (settings.domain_weights or dict.fromkeys(by_domain, 1.0)).items() if d in by_domain}
    shares = {d: w for d, w in shares.items() if d not in settings.without_domains}
    scale = sum(shares.values())
    weights = {d: w / scale / max(by_domain[d].rows, 1) for d, w in shares.items()}
    range_basis = RangeSketch.combined_range(by_domain, weights)

    def make(_: str, width: int) -> Any:
        return range_basis.accumulator(width)

    collector = InputCollector(modules, groups=job.groups, only=job.only, make_moment=make)
    _run(collector, forward, calls, sharded=sharded, report=report)
    return sketch_spectrum(range_basis, _reduced(collector, first), weights)


def _width(module: nn.Module) -> int:
    for attribute in ("in_features", "nx"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]


def mean_null_share(calibration: Calibration) -> float:
    """Return the mean share of null directions over the layers' inputs (0 without layers)."""
    shares = [basis.null_dims / basis.width for basis in calibration.bases.values()]
    return math.fsum(shares) / len(shares) if shares else 0.0
