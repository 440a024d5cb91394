"""What a null space left of the gradients and how well it was kept, as plain numbers for a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.evaluation.diagnosis import InputFacts, NullSpaceFacts
from nspo_lightning.nullspace import Calibration, LayerCertificate
from nspo_lightning.nullspace.keeper import GradientEnergy

FIRST_UPDATES = 8
"""Updates from the start at which the kept energy is measured, however seldom the Trainer logs."""


class KeptEnergy:
    """Mean share of the gradient's energy that projections kept; nothing is read from the device on the way."""

    def __init__(self) -> None:
        self.measured = 0
        self._shares: Tensor | None = None
        self._updates: Tensor | None = None

    def add(self, energy: GradientEnergy) -> None:
        """Count an update; one without a gradient (A's first, B being 0) has no share."""
        some = energy.before > 0
        share = torch.where(some, energy.after / torch.where(some, energy.before, 1.0), 0.0)
        self.measured += 1
        self._shares = share if self._shares is None else self._shares + share
        self._updates = some.int() if self._updates is None else self._updates + some.int()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to end with the same mean."""
        return {
            "measured": self.measured,
            "shares": None if self._shares is None else self._shares.detach().cpu(),
            "updates": None if self._updates is None else self._updates.detach().cpu(),
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a `state`."""
        self.measured = int(state["measured"])
        self._shares, self._updates = (
            None if state[name] is None else state[name].to(device) for name in ("shares", "updates")
        )

    def mean(self) -> tuple[float | None, int]:
        """Return the mean, None without an update that has a share, and of how many."""
        if self._shares is None or self._updates is None or not (updates := int(self._updates)):
            return None, 0
        return float(self._shares) / updates, updates


def null_space_facts(
    calibration: Calibration,
    certificates: Sequence[LayerCertificate],
    kept: KeptEnergy,
    *,
    held: bool,
    change: float | None,
) -> NullSpaceFacts:
    """Return the facts of a fit.

    Args:
        calibration: Bases of the fit.
        certificates: Certificates of its layers.
        kept: What projections kept of its gradients.
        held: Whether its updates were to stay in the null space.
        change: The measured change of outputs, if it is.
    """
    hard = calibration.settings.form == "hard"
    share, updates = kept.mean() if hard else (None, 0)  # the soft form scales directions, and its share says little
    worst = max(certificates, key=lambda one: one.leak, default=None)
    inputs = [
        InputFacts(name=first, width=basis.width, free=basis.null_dims, tokens=basis.tokens)
        for first, basis in calibration.bases.items()
    ]
    return NullSpaceFacts(
        inputs=inputs if hard else [],
        criterion=calibration.settings.criterion,
        kept_energy=share,
        kept_updates=updates,
        leak=None if worst is None else worst.leak,
        leak_layer="" if worst is None else worst.name,
        held=held,
        bound=max((one.output_change for one in certificates), default=None),
        change=change,
    )
