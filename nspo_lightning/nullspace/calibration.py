"""From forward passes to bases: the whole calibration, without any framework.

    calls -> moments by input and domain -> (sum over ranks) -> one moment by input -> spectrum -> k -> basis

Under a memory budget the inputs are spread over several passes; a single input too wide for the budget is sketched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.basis import Spectrum, dead_channels
from nspo_lightning.nullspace.basis_builder import (
    BasisBuilder,
    directions_for,
    domain_moments,
    moment_to_learn,
    protected_count,
)
from nspo_lightning.nullspace.basis_set import Calibration, least_energy
from nspo_lightning.nullspace.basis_settings import BasisSettings
from nspo_lightning.nullspace.collect import InputCollector, RunningSum
from nspo_lightning.nullspace.contrast import Candidates
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.domains import STARTS_TO_LEARN, are_starts, combine, is_apart
from nspo_lightning.nullspace.passes import CalibrationText, ForwardCall, PassPlan, Report
from nspo_lightning.nullspace.shapes import input_width
from nspo_lightning.nullspace.sketch import (
    MOST_PASSES,
    PROBES,
    RangeSketch,
    combined_image,
    random_test_matrix,
    settled,
    sketch_spectrum,
)
from nspo_lightning.nullspace.weight_directions import weight_directions


class UnheldLayersError(ValueError):
    """Layers that have no basis, since no text reached them."""

    def __init__(self, names: Sequence[str], of: int) -> None:
        super().__init__(
            f"{len(names)} of {of} layers saw no input during calibration, so nothing can protect them: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Their weights are used without calling the "
            "module (as torch.nn.MultiheadAttention does), or no text reaches them. Freeze them "
            "(`unprotected='freeze'`) or leave them out (`target_modules`)."
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
    sharded: bool = False,
    allow_unreached: bool = False,
    progress: Report | None = None,
    count: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Calibration:
    """Run calibration text through a model and build a basis for each distinct layer input.

    Args:
        modules: Layer name -> module whose input is protected.
        forward: Called with each batch's arguments; under no_grad, the caller sets eval mode and precision.
        calls: Returns the batches, anew for each pass.
        settings: What decides the bases.
        memory_budget_gb: Limit for moments and sketches at one time, on each rank; None = one pass, on a GPU 60 % of
            its free memory.
        keep_moments: Keep the second moments by domain (on the CPU, float32), for `Calibration.recombined`.
        sharded: Each rank's ``calls`` yield different batches already; else rank r takes every world-th one.
        allow_unreached: Note layers that are never called in `Calibration.unreached`; else they are an error.
        progress: Called with (stage, batches or layers done, of how many).
        count: Batches that ``calls`` returns, if known; only for `progress`.
        say: Called with a line about passes and memory, where there is a limit.

    Returns:
        The calibration, the same on every rank.

    Raises:
        ValueError: If there are no batches or no rows that count.
        UnheldLayersError: If there are layers that were never called, and they are not allowed.
    """
    text = CalibrationText(
        modules=modules,
        forward=forward,
        calls=calls,
        sharded=sharded,
        report=progress or (lambda *_: None),
        count=count,
        allow_unreached=allow_unreached,
        starts=settings.starts > 0 or keep_moments,
        starts_apart=tuple(settings.domain_limits or ()),
        leaves_out=settings.leaves_out,
        limits=len(settings.domain_limits or ()) if settings.needs_text_to_learn else None,
    )
    result = Calibration(bases={}, groups={}, settings=settings)

    def weights_of(first: str) -> Tensor:  # of one rank, so that all hold the same vectors
        return ranks.broadcast_tensor(weight_directions([modules[name] for name in result.groups[first]]), 0)

    builder = BasisBuilder(settings, weights_of)
    result.bases = builder.bases
    budget = None if memory_budget_gb is None else memory_budget_gb * 1e9
    plan = PassPlan(text, budget)
    if plan.budget is not None and say is not None:
        say(f"Null space: {plan.describe()}.")
    while plan.passes or plan.too_wide:  # both grow by layers that turn out to read something of their own
        if settings.needs_text_to_learn and plan.too_wide:
            raise ValueError(
                f"{settings.asker} needs whole second moments, and those of {len(plan.too_wide)} "
                f"inputs (the first: {plan.too_wide[0]}) do not fit into `memory_budget_gb`. Raise it, or choose "
                "criterion='auto'."
            )
        if plan.passes:
            _sum_in_one_pass(text, plan, result, builder, keep_moments=keep_moments)
        else:
            for first, spectrum in _sketched_spectra(text, plan, result):
                builder.add(first, spectrum)
    builder.finish()
    result.promises = builder.promises
    return result


def _sum_in_one_pass(
    text: CalibrationText, plan: PassPlan, result: Calibration, builder: BasisBuilder, *, keep_moments: bool
) -> None:
    """Make the next planned pass, and hand the spectrum of each input that it summed to the builder."""
    only = plan.passes.pop(0)
    collector: InputCollector[SecondMoment] = InputCollector(
        text.modules, groups=plan.groups, only=only, starts_apart=text.starts_apart
    )
    firsts = _collect(text, collector, result, plan, only)
    text.report("layers", 0, len(firsts))
    for index, first in enumerate(firsts):
        sums = collector.over_ranks(first)
        collector.moments.pop(first, None)
        _count_tokens(result, first, sums)
        moments = {domain: s.take() for domain, s in sums.items()}
        if (means := collector.start_means_over_ranks(first)) is not None:
            moments[STARTS_TO_LEARN] = means.second_moment()
        if keep_moments:
            kept = {d: m.to(device="cpu", dtype=torch.float32, copy=True) for d, m in moments.items()}
            result.moments[first] = kept
        builder.add(first, _exact_spectrum(moments, sums, result.settings, builder.count))
        text.report("layers", index + 1, len(firsts))


def _collect(
    text: CalibrationText,
    collector: InputCollector[Any],
    result: Calibration,
    plan: PassPlan,
    only: Sequence[str] | None,
) -> list[str]:
    """Make a pass; note groups and output energies in the result, and return the inputs that were summed."""
    text.run(collector)
    groups, apart = collector.agreed_groups()
    called = {name for names in groups.values() for name in names}
    result.unreached = tuple(name for name in text.modules if name not in called)
    if result.unreached and not text.allow_unreached:
        raise UnheldLayersError(result.unreached, len(text.modules))
    plan.settle(groups, apart, only)
    firsts = [first for first in groups if first not in apart and (only is None or first in only)]
    result.groups |= {first: groups[first] for first in firsts}
    result.domain_energy |= _energy_by_domain(collector)
    result.output_energy = least_energy(result.domain_energy, result.settings)
    return firsts


def _energy_by_domain(collector: InputCollector[Any]) -> dict[str, dict[str, float]]:
    """Return layer -> domain -> mean squared norm of the layer's outputs, over ranks."""
    sums: dict[str, dict[str, tuple[float, int]]] = {}
    mine = {
        name: {domain: (float(energy.total), energy.rows) for domain, energy in by_domain.items()}
        for name, by_domain in collector.output_energy.items()
    }
    for found in ranks.gather_objects(mine):
        for name, by_domain in found.items():
            so_far = sums.setdefault(name, {})
            for domain, (total, rows) in by_domain.items():
                before = so_far.get(domain, (0.0, 0))
                so_far[domain] = (before[0] + total, before[1] + rows)
    return {
        name: {domain: total / max(rows, 1) for domain, (total, rows) in by_domain.items()}
        for name, by_domain in sums.items()
    }


def _count_tokens(result: Calibration, first: str, sums: Mapping[str, RunningSum]) -> None:
    if sum(s.rows for s in sums.values()) == 0:
        raise ValueError(f"No calibration row counted for {first}: every mask entry was False.")
    # A module that is called several times in a forward sees each token several times: the least is the count.
    known = result.domain_tokens
    texts = {d: s.rows for d, s in sums.items() if d != STARTS_TO_LEARN and not are_starts(d)}
    result.domain_tokens = known | {d: min(rows, known.get(d, rows)) for d, rows in texts.items()}


def _exact_spectrum(
    moments: dict[str, Tensor], sums: Mapping[str, SecondMoment], settings: BasisSettings, index: int
) -> Spectrum | Candidates:
    """Return eigenpairs found on one rank, so that all ranks hold the same vectors even where eigenvalues coincide."""
    shares = settings.shares(moments)
    to_learn = moment_to_learn(moments, settings)
    domains = domain_moments(moments, settings)
    moment = combine(moments, shares, in_place=not domains)
    moments.clear()
    tokens = sum(sums[domain].rows for domain in shares if not is_apart(domain))
    resolution = max(s.resolution for s in sums.values())
    rounded_energy = max(s.rounded_energy for s in sums.values() if s.resolution == resolution)
    owner = index % ranks.world_size()
    found: Spectrum | Candidates | None = None
    if ranks.rank() == owner:
        found = directions_for(
            settings,
            moment,
            to_learn,
            tokens=tokens,
            resolution=resolution,
            rounded_energy=rounded_energy,
            domains=domains,
        )
    if ranks.world_size() == 1 and found is not None:
        return found
    if to_learn is not None:
        shared = ranks.broadcast_object(found, owner)
        assert shared is not None  # the owner found them
        return shared
    assert not isinstance(found, Candidates)
    described = None if found is None else (tuple(found.vectors.shape), found.vectors.dtype)
    described = ranks.broadcast_object(described, owner)
    assert described is not None  # the owner described its eigenvectors
    shape, dtype = described
    values = found.values if found else torch.zeros(moment.shape[0], dtype=torch.float64)
    vectors = found.vectors if found else torch.zeros(shape, dtype=dtype, device=moment.device)
    return Spectrum(
        values=ranks.broadcast_tensor(values, owner),
        vectors=ranks.broadcast_tensor(vectors, owner),
        tokens=tokens,
        dead=dead_channels(moment),
    )


def _sketched_spectra(text: CalibrationText, plan: PassPlan, result: Calibration) -> Iterator[tuple[str, Spectrum]]:
    """Yield the leading eigenpairs of inputs too wide to hold, by several passes over the text (see `sketch`)."""
    settings, sketches = result.settings, plan.next_sketches()
    tests = {
        first: random_test_matrix(input_width(text.modules[first]), columns + PROBES, settings.seed)
        for first, columns in sketches.items()
    }
    before: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    for number in range(MOST_PASSES):
        collector = InputCollector(
            text.modules,
            groups=plan.groups,
            only=list(tests),
            new_sum=lambda first, width: RangeSketch(width, tests[first]),
        )
        if number == 0:  # the image of a random matrix: only its range is used
            found = _collect(text, collector, result, plan, list(tests))
            for first in set(tests) - set(found):
                del tests[first]
        else:
            text.run(collector)
        for first in list(tests):
            sums, columns = collector.over_ranks(first), sketches[first]
            collector.moments.pop(first, None)
            weights, tokens = _domain_weights(sums, settings)
            trace = sum(weight * sums[d].trace for d, weight in weights.items())
            image = combined_image(sums, weights)
            if number == 0:
                _count_tokens(result, first, sums)
                probes[first], image = image[:, columns:].clone(), image[:, :columns]
            else:
                spectrum = sketch_spectrum(tests[first], image, probes=probes[first], trace=trace, tokens=tokens)
                last = number == MOST_PASSES - 1
                if last or settled(spectrum.values, before.get(first), protected_count(spectrum, settings), columns):
                    del tests[first], probes[first]
                    yield first, spectrum
                    continue
                before[first] = spectrum.values
            tests[first] = torch.linalg.qr(image).Q
            del image
        if not tests:
            return
    raise AssertionError("the last pass returns")


def _domain_weights(sums: Mapping[str, RangeSketch], settings: BasisSettings) -> tuple[dict[str, float], int]:
    """Return the factor of each domain's sum in the combined second moment, and the rows that it is taken over."""
    shares = settings.shares(sums)
    tokens = sum(sums[d].rows for d in shares if not is_apart(d))
    return {d: share / max(sums[d].rows, 1) for d, share in shares.items()}, tokens
