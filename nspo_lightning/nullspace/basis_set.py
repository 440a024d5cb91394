"""Bases for a whole model, the settings that decide them, and how the two are made from spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from nspo_lightning.nullspace.contrast import MOST_FREE, Candidates, candidates, choose_free, contrast_basis
from nspo_lightning.nullspace.criteria import (
    Criterion,
    NoNullDirections,
    RankChoice,
    check_threshold,
    choose_rank,
    energy_left,
    value_leaving_one,
)
from nspo_lightning.nullspace.domain_limits import Promise, within_limits
from nspo_lightning.nullspace.domains import (
    STARTS,
    TO_LEARN,
    combine,
    domain_shares,
    is_apart,
    shares_to_learn,
    starts_of,
)

CONTRAST_START_WEIGHT = 0.9
"""``contrast`` weighs the starts of answers so where nothing else is asked: whether to answer is decided there."""
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
    start_weight: float | None = None
    domain_limits: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_limits()
        check_threshold(self.criterion, self.threshold)
        for name, value, allowed in (("form", self.form, Form), ("subspace", self.subspace, Subspace)):
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(allowed))}, got {value!r}.")
        if not 0 <= self.min_null_share < 1:
            raise ValueError(f"`min_null_share` must lie in [0, 1), got {self.min_null_share}.")
        if not self.softness > 0:
            raise ValueError(f"`softness` must be positive, got {self.softness}.")
        if self.start_weight is not None and not 0 <= self.start_weight <= 1:
            raise ValueError(f"`start_weight` must be a share in [0, 1], got {self.start_weight}. 0.9 is a good start.")
        if self.criterion == "contrast" and self.form == "soft":
            raise ValueError("criterion='contrast' chooses what is cut; form='soft' has no cut. Choose one of them.")
        if self.subspace == "to_learn" and (self.criterion == "contrast" or self.form == "soft"):
            raise ValueError(
                "subspace='to_learn' starts in as many leading directions of the prompts that are trained on as a "
                "spectrum says: choose criterion='rank' (or another one that looks at eigenvalues) and form='hard'."
            )
        if self.subspace == "weights" and (self.criterion == "contrast" or self.form == "soft"):
            raise ValueError(
                "subspace='weights' takes the weights' directions, as many as a spectrum says: choose criterion='auto' "
                "(or another one that looks at eigenvalues) and form='hard'."
            )

    def _check_limits(self) -> None:
        limits = self.domain_limits or {}
        if limits and self.criterion != "contrast":
            raise ValueError(
                f"`domain_limits` are kept by criterion='contrast', which knows what a step of a given gain costs; got "
                f"criterion={self.criterion!r}. Choose contrast, or weigh domains by `domain_weights`."
            )
        for domain, limit in limits.items():
            if not 0 < limit < math.inf:
                raise ValueError(
                    f"`domain_limits` of {domain!r} must be positive, got {limit}: the harm promised there, 1 = what "
                    "training without projection does. 0.02 is a start; `calibrate` prints what is promised now."
                )
            if domain in self.without_domains:
                raise ValueError(f"{domain!r} is in `domain_limits` and in `without_domains`. Name it in one of them.")

    @property
    def starts(self) -> float:
        """The weight of answers' starts, see `domains`."""
        if self.start_weight is not None:
            return self.start_weight
        return CONTRAST_START_WEIGHT if self.needs_text_to_learn else 0.0

    @property
    def needs_text_to_learn(self) -> bool:
        """Whether the prompts that are trained on are calibrated on too."""
        return self.criterion == "contrast" or self.subspace == "to_learn"

    @property
    def asker(self) -> str:
        """What it is that needs it, for messages."""
        return "subspace='to_learn'" if self.subspace == "to_learn" else f"criterion={self.criterion!r}"

    def shares(self, domains: Iterable[str]) -> dict[str, float]:
        """Return the share of each domain in what is protected, see `domain_shares`.

        Raises:
            ValueError: If starts of answers are to weigh, and calibration saw none.
        """
        domains = list(domains)
        known = {name for name in domains if not is_apart(name)}
        if unknown := sorted(set(self.domain_limits or ()) - known):
            raise ValueError(f"`domain_limits` names {unknown}; calibration saw {sorted(known)}.")
        if self.start_weight and STARTS not in domains:
            raise ValueError(
                f"`start_weight` is {self.start_weight:g}, and no calibration batch says where answers start: give "
                "`answer_starts` (True there, shape as the mask) in each batch, or leave `start_weight` out."
            )
        return domain_shares(domains, self.domain_weights, without=self.without_domains, start_weight=self.starts)

    def choose(self, values: Tensor, dead: int = 0) -> RankChoice:
        """Return how many directions of a spectrum are protected, in the hard form; see `choose_rank`."""
        return choose_rank(
            values,
            self.criterion,
            self.threshold,
            min_null_share=self.min_null_share,
            max_output_change=self.max_output_change,
            dead=dead,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for fingerprints and files."""
        values = dict(vars(self))
        values["domain_weights"] = dict(self.domain_weights) if self.domain_weights else None
        values["domain_limits"] = dict(self.domain_limits) if self.domain_limits else None
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
    promises: dict[str, Promise] = field(default_factory=dict)
    """Domain -> what ``contrast`` promises of it; empty with other criteria."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    """Layers that were asked for and saw no input: they have no basis."""
    grown: tuple[dict[str, str], ...] = ()
    """Fingerprints (``weights``, ``buffers``) of what the model became in training that these bases held: its outputs
    on the calibration text are the same, so the bases are its own too."""

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
        builder = BasisBuilder(settings)
        for name, by_domain in self.moments.items():
            shares = settings.shares(by_domain)
            tokens = sum(self.domain_tokens[domain] for domain in shares if not is_apart(domain))
            to_learn = moment_to_learn(by_domain, settings)
            mean = combine(by_domain, shares)
            resolution = torch.finfo(torch.float32).eps
            domains = domain_moments(by_domain, settings)
            found = directions_for(settings, mean, to_learn, tokens=tokens, resolution=resolution, domains=domains)
            builder.add(name, found)
        return replace(
            self,
            bases=builder.finish(),
            promises=builder.promises,
            settings=settings,
            output_energy=least_energy(self.domain_energy, settings),
            fingerprint=self.fingerprint | {"settings": settings.as_dict()},
        )


def least_energy(domain_energy: Mapping[str, Mapping[str, float]], settings: BasisSettings) -> dict[str, float]:
    """Return `Calibration.output_energy` from the energies by domain."""
    found = {}
    for layer, energies in domain_energy.items():
        shares = settings.shares(energies)
        found[layer] = min(share * energies[domain] for domain, share in shares.items())
    return found


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
    """Makes the basis of one input after another, and refuses together those that keep no null direction.

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
        """Choose how much of an input is protected, and build its basis; candidates wait for the others' (`finish`)."""
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


def mean_null_share(calibration: Calibration) -> float:
    """Return the mean share of null directions over the layers' inputs (0 without layers)."""
    shares = [basis.null_dims / basis.width for basis in calibration.bases.values()]
    return math.fsum(shares) / len(shares) if shares else 0.0
