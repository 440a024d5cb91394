"""From forward passes to bases: the whole calibration, without any framework.

    calls -> moments by input and domain -> (sum over ranks) -> one moment by input -> spectrum -> k -> basis

Under a memory budget the inputs are spread over several passes; a single input too wide for the budget is sketched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.basis import Basis, Spectrum
from nspo_lightning.nullspace.basis_set import (
    BasisSettings,
    Calibration,
    basis_from_spectrum,
    decompose_for,
    refuse_empty,
)
from nspo_lightning.nullspace.collect import InputCollector, RepeatBatch
from nspo_lightning.nullspace.domains import combine
from nspo_lightning.nullspace.sketch import (
    MOST_PASSES,
    RangeSketch,
    combined_image,
    random_test_matrix,
    settled,
    sketch_columns,
    sketch_spectrum,
)

_NO_BATCHES = "Calibration got no batches. Check `calibration` or the datamodule's `calibration_dataloader()`."


@dataclass(frozen=True, kw_only=True)
class ForwardCall:
    """One calibration batch, ready to run."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    """True (non-zero) = this row's inputs count."""
    domains: Sequence[str] | None = None
    """Domain of each sample."""


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
        make = functools.partial(_new_sketch, job.sketch_columns, settings.seed) if job.sketch_columns else None
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
            # A module that is called several times in a forward sees each token several times: the least is the count.
            result.domain_tokens = {d: min(n, result.domain_tokens.get(d, n)) for d, n in tokens.items()}
            if sum(tokens.values()) == 0:
                raise ValueError(f"No calibration row counted for {first}: every mask entry was False.")
            if job.sketch_columns:
                spectrum = _sketched(first, modules, by_domain, forward, calls, settings, sharded, job, report)
            else:
                moments = {domain: m.second_moment() for domain, m in by_domain.items()}
                mean = combine(moments, settings.domain_weights, without=settings.without_domains)
                resolution = max(m.resolution for m in by_domain.values())
                spectrum = _decompose_on_owner(settings, mean, len(values), sum(tokens.values()), resolution)
                if keep_moments:
                    result.moments[first] = {d: m.to(device="cpu", dtype=torch.float32) for d, m in moments.items()}
            values[first] = spectrum.values
            bases[first] = basis_from_spectrum(len(bases), spectrum, settings)
            collector.moments.pop(first, None)
    refuse_empty(values, settings)
    result.bases = {name: basis for name, basis in bases.items() if basis is not None}
    return result


def _new_sketch(columns: int, seed: int, _: str, width: int) -> RangeSketch:
    return RangeSketch(width, random_test_matrix(width, columns, seed))


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
            "module (as torch.nn.MultiheadAttention does), or no text reaches them. Freeze them or leave them out."
        )


def _reduced(collector: InputCollector, first: str) -> dict[str, Any]:
    """Return an input's accumulators, summed over ranks; a domain that this rank did not see counts as zeros."""
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


def _decompose_on_owner(
    settings: BasisSettings, moment: Tensor, index: int, tokens: int, resolution: float
) -> Spectrum:
    """Return eigenpairs found on one rank, so that all ranks hold the same vectors even where eigenvalues coincide."""
    if ranks.world_size() == 1:
        return decompose_for(settings, moment, tokens=tokens, resolution=resolution)
    owner = index % ranks.world_size()
    found = None
    if ranks.rank() == owner:
        found = decompose_for(settings, moment, tokens=tokens, resolution=resolution)
    described = None if found is None else (tuple(found.vectors.shape), found.vectors.dtype)
    described = ranks.broadcast_object(described, owner)
    assert described is not None  # the owner described its eigenvectors
    shape, dtype = described
    values = found.values if found else torch.zeros(moment.shape[0], dtype=torch.float64)
    vectors = found.vectors if found else torch.zeros(shape, dtype=dtype, device=moment.device)
    values = ranks.broadcast_tensor(values, owner)
    vectors = ranks.broadcast_tensor(vectors, owner)
    return Spectrum(values=values, vectors=vectors, tokens=tokens, resolution=resolution)


def _sketched(
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
    """Return the leading eigenpairs of an input too wide to hold, by further passes over the text."""
    shares = {d: w for d, w in (settings.domain_weights or dict.fromkeys(by_domain, 1.0)).items() if d in by_domain}
    shares = {d: w for d, w in shares.items() if d not in settings.without_domains}
    scale = sum(shares.values())
    weights = {d: w / scale / max(by_domain[d].rows, 1) for d, w in shares.items()}
    tokens = sum(by_domain[d].rows for d in weights)
    image, before = combined_image(by_domain, weights), None
    for _ in range(MOST_PASSES - 1):
        test: Tensor = torch.linalg.qr(image).Q
        del image

        def make(_: str, width: int, test: Tensor = test) -> RangeSketch:
            return RangeSketch(width, test)

        collector = InputCollector(modules, groups=job.groups, only=job.only, make_moment=make)
        _run(collector, forward, calls, sharded=sharded, report=report)
        parts = _reduced(collector, first)
        trace = sum(weight * parts[d].trace for d, weight in weights.items())
        image = combined_image(parts, weights)
        spectrum = sketch_spectrum(test, image, trace=trace, tokens=tokens)
        chosen = basis_from_spectrum(0, spectrum, settings)
        protected = spectrum.vectors.shape[1] if chosen is None else chosen.protected
        if settled(spectrum.values, before, protected, test.shape[1]):
            break
        before = spectrum.values
    return spectrum


def _width(module: nn.Module) -> int:
    for attribute in ("in_features", "nx"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
