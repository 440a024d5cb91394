"""Bases for a whole model, the settings that decide them, and how the two are made from spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
from nspo_lightning.nullspace.criteria import Criterion, RankChoice, check_threshold, choose_rank, energy_left
from nspo_lightning.nullspace.domains import combine


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
            spectra[name] = decompose_for(settings, mean, tokens=tokens, resolution=torch.finfo(torch.float32).eps)
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


_LEADING = ("energy", "bound", "relative", "absolute", "rank", "null_share")
"""Criteria that leading eigenvalues and the sum of the others decide; ``auto`` looks at every eigenvalue."""
_LEAST_ENERGY = 1e-10  # below it rounding decides what is left of a trace, and each small eigenvalue must be known


def decompose_for(settings: BasisSettings, moment: Tensor, *, tokens: int, resolution: float) -> Spectrum:
    """Return as much of a moment's spectrum as the settings need (see `decompose`).

    Args:
        settings: criterion and form.
        moment: shape ``(width, width)``.
        tokens: rows that it was taken over.
        resolution: relative rounding noise in it.

    Returns:
        The eigenpairs.
    """
    threshold = check_threshold(settings.criterion, settings.threshold)
    least = {"energy": _LEAST_ENERGY, "bound": math.sqrt(_LEAST_ENERGY)}.get(settings.criterion, 0.0)
    leading = settings.criterion in _LEADING and settings.form == "hard" and settings.subspace != "protected"
    if not leading or threshold is None or threshold < least:
        return decompose(moment, tokens=tokens, resolution=resolution)

    def find_cut(values: Tensor) -> int:
        return choose_rank(values, settings.criterion, threshold).protected

    known = settings.criterion in ("rank", "null_share")
    count = find_cut(torch.ones(moment.shape[0], dtype=torch.float64)) if known else None
    return decompose(moment, tokens=tokens, resolution=resolution, find_cut=find_cut, count=count)


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
    bases = {
        name: basis_from_spectrum(index, spectrum, settings) for index, (name, spectrum) in enumerate(spectra.items())
    }
    refuse_empty({name: s.values for name, s in spectra.items()}, settings)
    return {name: basis for name, basis in bases.items() if basis is not None}


def basis_from_spectrum(index: int, spectrum: Spectrum, settings: BasisSettings) -> Basis | None:
    """Return one input's basis (``index`` seeds a random subspace), None where no null direction is left."""
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
        reason = f"{choice.reason}; held by the sketch's {available} directions"
        choice = RankChoice(
            protected=available, energy_left=left, null_share=share, gain=left / share**2, reason=reason
        )
    return build_basis(spectrum, choice, subspace=settings.subspace, seed=settings.seed + index)


def refuse_empty(values: Mapping[str, Tensor], settings: BasisSettings) -> None:
    """Refuse together all inputs whose eigenvalues leave no null direction (see `choose_ranks`)."""
    if settings.form == "hard":
        choose_ranks(
            values,
            settings.criterion,
            settings.threshold,
            min_null_share=settings.min_null_share,
            max_output_change=settings.max_output_change,
        )


def mean_null_share(calibration: Calibration) -> float:
    """Return the mean share of null directions over the layers' inputs (0 without layers)."""
    shares = [basis.null_dims / basis.width for basis in calibration.bases.values()]
    return math.fsum(shares) / len(shares) if shares else 0.0
