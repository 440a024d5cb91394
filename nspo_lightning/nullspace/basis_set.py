"""Bases for a whole model, the settings that decide them, and how the two are made from spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import (
    Basis,
    Form,
    Spectrum,
    Subspace,
    build_basis,
    build_soft_basis,
    decompose,
)
from nspo_lightning.nullspace.criteria import (
    Criterion,
    NoNullDirections,
    RankChoice,
    check_threshold,
    choose_rank,
    energy_left,
    value_leaving_one,
)
from nspo_lightning.nullspace.domains import combine, domain_shares

_SHOWN = 8  # inputs that a refusal names


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
        for name, value, allowed in (("form", self.form, Form), ("subspace", self.subspace, Subspace)):
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(allowed))}, got {value!r}.")
        if not 0 <= self.min_null_share < 1:
            raise ValueError(f"`min_null_share` must lie in [0, 1), got {self.min_null_share}.")
        if not self.softness > 0:
            raise ValueError(f"`softness` must be positive, got {self.softness}.")

    def choose(self, values: Tensor) -> RankChoice:
        """Return how many directions of a spectrum are protected, in the hard form."""
        return choose_rank(
            values,
            self.criterion,
            self.threshold,
            min_null_share=self.min_null_share,
            max_output_change=self.max_output_change,
        )

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
    """Layer -> the least, over domains, of the domain's weight times the mean squared norm of the layer's outputs on
    its rows. A change that is bounded relative to it is bounded in every domain, and in any mixture of them."""
    domain_energy: dict[str, dict[str, float]] = field(default_factory=dict)
    """Layer -> domain -> mean squared norm of the layer's outputs on its rows."""
    domain_tokens: dict[str, int] = field(default_factory=dict)
    """Domain -> rows that counted."""
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Input -> domain -> second moment, where they were kept."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    """Layers that were asked for and saw no input: they have no basis."""

    def basis_of(self, layer: str) -> Basis:
        """Return the basis of a layer by its name.

        Raises:
            KeyError: If the layer was not calibrated.
        """
        leaders = self.leaders()
        if layer not in leaders:
            raise KeyError(f"No basis for layer {layer!r}; calibrated layers: {sorted(leaders)[:8]} ...")
        return self.bases[leaders[layer]]

    def leaders(self) -> dict[str, str]:
        """Return layer -> first layer of its input, the name of its basis."""
        return {name: first for first, names in self.groups.items() for name in names}

    def layer_names(self) -> set[str]:
        """Return the names of all calibrated layers."""
        return set(self.leaders())

    def recombined(self, settings: BasisSettings) -> Calibration:
        """Return bases for other settings (another criterion, a domain left out) from the kept moments.

        Raises:
            ValueError: If the moments were not kept.
        """
        if set(self.moments) != set(self.bases):
            raise ValueError("The moments of this calibration were not kept. Calibrate with `keep_moments=True`.")
        spectra = {}
        for name, by_domain in self.moments.items():
            tokens = sum(n for d, n in self.domain_tokens.items() if d not in settings.without_domains)
            mean = combine(by_domain, settings.domain_weights, without=settings.without_domains)
            spectra[name] = decompose_for(settings, mean, tokens=tokens, resolution=torch.finfo(torch.float32).eps)
        return replace(
            self,
            bases=bases_from_spectra(spectra, settings),
            settings=settings,
            output_energy=least_energy(self.domain_energy, settings),
            fingerprint=self.fingerprint | {"settings": settings.as_dict()},
        )


def least_energy(domain_energy: Mapping[str, Mapping[str, float]], settings: BasisSettings) -> dict[str, float]:
    """Return `Calibration.output_energy` from the energies by domain."""
    found = {}
    for layer, energies in domain_energy.items():
        shares = domain_shares(energies, settings.domain_weights, without=settings.without_domains)
        found[layer] = min(share * energies[domain] for domain, share in shares.items())
    return found


_LEADING = ("energy", "bound", "relative", "absolute", "rank", "null_share")
"""Criteria that leading eigenvalues and the sum of the others decide; ``auto`` looks at every eigenvalue."""
_LEAST_ENERGY = 1e-10  # below it rounding decides what is left of a trace, and each small eigenvalue must be known


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
    """Makes the basis of one input after another, and refuses together those that keep no null direction."""

    def __init__(self, settings: BasisSettings) -> None:
        self.settings = settings
        self.bases: dict[str, Basis] = {}
        self.count = 0
        """Inputs so far."""
        self._refused: list[str] = []

    def add(self, name: str, spectrum: Spectrum) -> None:
        """Choose how much of an input is protected, and build its basis."""
        settings, values = self.settings, spectrum.values
        self.count += 1
        if settings.form == "soft":
            self.bases[name] = build_soft_basis(spectrum, settings.softness)
            return
        choice = settings.choose(values)
        if choice.protected >= values.numel():
            cure = value_leaving_one(values, settings.criterion)
            self._refused.append(f"  {name} (width {values.numel()}): {cure}")
        elif choice.protected == 0 and float(values[0]) > 0 and values.numel() > 1:
            self._refused.append(f"  {name}: nothing would be protected, its largest eigenvalue is {values[0]:.3g}")
        else:
            held = _held_by_sketch(spectrum, choice)
            seed = settings.seed + self.count - 1
            self.bases[name] = build_basis(spectrum, held, subspace=settings.subspace, seed=seed)

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
        return self.bases


def bases_from_spectra(spectra: Mapping[str, Spectrum], settings: BasisSettings) -> dict[str, Basis]:
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


def mean_null_share(calibration: Calibration) -> float:
    """Return the mean share of null directions over the layers' inputs (0 without layers)."""
    shares = [basis.null_dims / basis.width for basis in calibration.bases.values()]
    return math.fsum(shares) / len(shares) if shares else 0.0
