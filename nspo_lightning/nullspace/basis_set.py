"""Bases for the layers of a model, and what they were made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_builder import BasisBuilder, directions_for, domain_moments, moment_to_learn
from nspo_lightning.nullspace.basis_settings import BasisSettings
from nspo_lightning.nullspace.domain_limits import Promise
from nspo_lightning.nullspace.domains import STARTS, combine, is_apart


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
            ValueError: If the moments were not kept, or the starts of answers are those of other domains.
        """
        if set(self.moments) != set(self.bases):
            raise ValueError("The moments of this calibration were not kept. Calibrate with `keep_moments=True`.")
        seen = {domain for by_domain in self.moments.values() for domain in by_domain}
        others = sorted(d for d in seen if settings.leaves_out(d) != self.settings.leaves_out(d))
        if others and settings.starts > 0 and STARTS in seen:
            raise ValueError(
                f"The starts of answers were summed over all domains that were not left out, and these settings leave "
                f"out others ({', '.join(others)} differ). Calibrate with these settings, or with `start_weight` 0."
            )
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


def mean_null_share(calibration: Calibration) -> float:
    """Return the mean share of null directions over the layers' inputs (0 without layers)."""
    shares = [basis.null_dims / basis.width for basis in calibration.bases.values()]
    return math.fsum(shares) / len(shares) if shares else 0.0
