"""From second moments to bases: what is decomposed, how much of it is protected, and which inputs are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import Basis, Spectrum, build_basis, build_soft_basis, decompose
from nspo_lightning.nullspace.basis_settings import BasisSettings
from nspo_lightning.nullspace.contrast import MOST_FREE, Candidates, candidates, choose_free, contrast_basis
from nspo_lightning.nullspace.criteria import (
    NoNullDirections,
    RankChoice,
    check_threshold,
    energy_left,
    value_leaving_one,
)
from nspo_lightning.nullspace.domain_limits import Promise, within_limits
from nspo_lightning.nullspace.domains import STARTS, TO_LEARN, combine, shares_to_learn, starts_of

_SHOWN = 8  # inputs that a refusal names
_LEADING = ("energy", "bound", "relative", "absolute", "rank", "null_share")
"""Criteria that leading eigenvalues and the sum of the others decide; ``auto`` looks at every eigenvalue."""
_LEAST_ENERGY = 1e-10  # below it rounding decides what is left of a trace, and each small eigenvalue must be known


def moment_to_learn(moments: Mapping[str, Tensor], settings: BasisSettings) -> Tensor | None:
    """Return the second moment S of the prompts that are trained on, where the settings want it.

    Raises:
        ValueError: If calibration saw none.
    """
    if not settings.needs_text_to_learn:
        return None
    shares = shares_to_learn(moments)
    if not shares:
        raise ValueError(
            f"{settings.asker} asks what the prompts that are trained on need, and calibration saw "
            f"none: give batches whose `domain` is {TO_LEARN!r}, a `calibration_dataloader(to_learn=...)`, or choose "
            "criterion='auto'."
        )
    return combine(moments, shares)


def domain_moments(moments: Mapping[str, Tensor], settings: BasisSettings) -> dict[str, Tensor]:
    """Return the second moment C_d of each domain that something is promised of; none but with ``contrast``.

    That of a limited domain has the starts of its own answers in it, with the weight that starts have in C.

    Raises:
        ValueError: If a limited domain has no such starts, and others have.
    """
    if settings.criterion != "contrast":
        return {}
    found = {name: moment for name, moment in moments.items() if name in settings.shares(moments)}
    for domain in settings.domain_limits or ():
        found[domain] = moments[domain]
        if STARTS not in moments or settings.starts == 0:
            continue
        if starts_of(domain) not in moments:
            raise ValueError(
                f"`domain_limits` names {domain!r}, and the starts of its answers are not known apart: give "
                "`answer_starts` in its batches, or where kept moments are combined anew, calibrate with this limit."
            )
        found[domain] = combine(moments, {domain: 1 - settings.starts, starts_of(domain): settings.starts})
    return found


def directions_for(
    settings: BasisSettings,
    moment: Tensor,
    to_learn: Tensor | None,
    *,
    tokens: int,
    resolution: float,
    rounded_energy: float = math.inf,
    domains: Mapping[str, Tensor] | None = None,
) -> Spectrum | Candidates:
    """Return what a basis is made of: eigenpairs, or with ``to_learn`` (see `moment_to_learn`) the candidates."""
    if to_learn is not None and settings.subspace == "to_learn":
        return decompose(to_learn, tokens=tokens, resolution=resolution)
    if to_learn is not None:
        least = settings.min_null_share
        return candidates(
            moment,
            to_learn,
            tokens=tokens,
            most_free=max(MOST_FREE, least),
            least_free=least,
            domains=domains,
            limited=settings.domain_limits or (),
        )
    return decompose_for(settings, moment, tokens=tokens, resolution=resolution, rounded_energy=rounded_energy)


def decompose_for(
    settings: BasisSettings, moment: Tensor, *, tokens: int, resolution: float, rounded_energy: float = math.inf
) -> Spectrum:
    """Return as much of a moment's spectrum as the settings need; see `decompose` for the arguments."""
    threshold = check_threshold(settings.criterion, settings.threshold)
    least = {"energy": _LEAST_ENERGY, "bound": math.sqrt(_LEAST_ENERGY)}.get(settings.criterion, 0.0)
    leading = settings.criterion in _LEADING and settings.form == "hard" and settings.subspace != "protected"
    if not leading or threshold is None or threshold < least:
        return decompose(moment, tokens=tokens, resolution=resolution, rounded_energy=rounded_energy)

    def find_cut(values: Tensor) -> int:
        return settings.choose(values).protected

    known = settings.criterion in ("rank", "null_share")
    count = find_cut(torch.ones(moment.shape[0], dtype=torch.float64)) if known else None
    return decompose(
        moment,
        tokens=tokens,
        resolution=resolution,
        rounded_energy=rounded_energy,
        find_cut=find_cut,
        count=count,
    )


class BasisBuilder:
    """Builds the bases of a model, input by input; inputs that keep no null direction are refused together.

    Args:
        settings: What decides the bases.
        weights_of: Returns the directions of the weights that read an input, for `subspace: weights`.
    """

    def __init__(self, settings: BasisSettings, weights_of: Callable[[str], Tensor] | None = None) -> None:
        self.settings = settings
        self.weights_of = weights_of
        self.bases: dict[str, Basis] = {}
        self.count = 0
        """Inputs so far."""
        self.promises: dict[str, Promise] = {}
        """Domain -> what is promised, once they are built."""
        self._refused: list[str] = []
        self._candidates: dict[str, Candidates] = {}

    def add(self, name: str, spectrum: Spectrum | Candidates) -> None:
        """Choose how much of an input is protected and build its basis; candidates are chosen among in `finish`."""
        self.count += 1
        if isinstance(spectrum, Candidates):
            self._candidates[name] = spectrum
            return
        settings, values = self.settings, spectrum.values
        if settings.form == "soft":
            self.bases[name] = build_soft_basis(spectrum, settings.softness)
            return
        choice = settings.choose(values, spectrum.dead)
        if choice.protected >= values.numel():
            cure = value_leaving_one(values, settings.criterion)
            self._refused.append(f"  {name} (width {values.numel()}): {cure}")
        elif choice.protected == 0 and float(values[0]) > 0 and values.numel() > 1:
            self._refused.append(f"  {name}: nothing would be protected, its largest eigenvalue is {values[0]:.3g}")
        else:
            held = _held_by_sketch(spectrum, choice)
            seed = settings.seed + self.count - 1
            own = self.weights_of(name) if settings.subspace == "weights" and self.weights_of is not None else None
            self.bases[name] = build_basis(spectrum, held, subspace=settings.subspace, seed=seed, directions=own)

    def finish(self) -> dict[str, Basis]:
        """Return input -> basis.

        Raises:
            NoNullDirections: Naming each input that keeps no null (or no protected) direction, the criterion and the
                value that would leave one.
        """
        if self._refused:
            shown = "\n".join(self._refused[:_SHOWN])
            more = f"\n  ... and {len(self._refused) - _SHOWN} more" if len(self._refused) > _SHOWN else ""
            raise NoNullDirections(
                f"criterion={self.settings.criterion!r}, threshold={self.settings.threshold} leaves no null direction, "
                f"or no protected one, in {len(self._refused)} of {self.count} layer inputs. What would leave one:\n"
                f"{shown}{more}\ncriterion='auto' finds a cut for each layer; form='soft' needs none."
            )
        self._choose_among_candidates()
        return self.bases

    def _choose_among_candidates(self) -> None:
        if not self._candidates:
            return
        settings = self.settings
        choose = partial(
            choose_free, min_null_share=settings.min_null_share, max_output_change=settings.max_output_change
        )
        found = within_limits(self._candidates, settings.domain_limits or {}, choose)
        self._candidates, self.promises = {}, found.promises
        for number, (name, of) in enumerate(found.found.items()):
            seed = settings.seed + number
            self.bases[name] = contrast_basis(of, found.choices[name], subspace=settings.subspace, seed=seed)


def bases_from_spectra(spectra: Mapping[str, Spectrum | Candidates], settings: BasisSettings) -> dict[str, Basis]:
    """Return input -> basis from input -> eigenpairs; see `BasisBuilder.finish` for what is refused."""
    builder = BasisBuilder(settings)
    for name, spectrum in spectra.items():
        builder.add(name, spectrum)
    return builder.finish()


def protected_count(spectrum: Spectrum, settings: BasisSettings) -> int:
    """Return how many of a sketch's directions its basis would protect (in the soft form: damp)."""
    if settings.form == "soft":
        return build_soft_basis(spectrum, settings.softness).protected
    return min(settings.choose(spectrum.values).protected, spectrum.vectors.shape[1])


def _held_by_sketch(spectrum: Spectrum, choice: RankChoice) -> RankChoice:
    """Return a choice with no more directions than a spectrum holds; one that is cut says so."""
    available = spectrum.vectors.shape[1]
    if choice.protected <= available:
        return choice
    left = float(energy_left(spectrum.values)[available])
    share = 1 - available / spectrum.values.numel()
    reason = f"{choice.reason}; held by the sketch's {available} directions"
    return RankChoice(protected=available, energy_left=left, null_share=share, gain=left / share**2, reason=reason)
