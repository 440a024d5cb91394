"""A budget of forgetting: what was measured, and whether it is over."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nspo_lightning.evaluation.rates import is_at_most
from nspo_lightning.nullspace.domains import START_TOKENS


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How far the policy is from its base.

    Attributes:
        step: Optimizer steps so far.
        kl: KL(base || policy) over whole answers, nats a token, the mean over skills.
        kl_first: Likewise over the first tokens of answers; NaN in text without prompts.
        accuracy_drop: Of the base's general accuracy, as a share; None = not measured now.
        refusal_rise: Above the base's share of ordinary prompts refused; None = not measured now.
        over: Why the budget is exceeded, in words; empty if it is not.
    """

    step: int
    kl: float
    kl_first: float = math.nan
    accuracy_drop: float | None = None
    refusal_rise: float | None = None
    over: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits; None = none. See `CapabilityGuard` for what they are about.

    Raises:
        ValueError: If one is out of range, or there is none at all.
    """

    max_kl: float | None = None
    max_kl_first: float | None = None
    max_accuracy_drop: float | None = None
    max_refusal_rise: float | None = None

    def __post_init__(self) -> None:
        limits = vars(self)
        if all(value is None for value in limits.values()):
            raise ValueError(
                "CapabilityGuard has no budget: give `max_kl` or `max_kl_first` (nats), `max_accuracy_drop` or "
                "`max_refusal_rise` (shares)."
            )
        for name, value in limits.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}. Leave it null for no such budget.")
        for name in ("max_accuracy_drop", "max_refusal_rise"):
            if (limits[name] or 0) >= 1:
                raise ValueError(f"`{name}` is a share, got {limits[name]}. Use 0.01 for one point.")

    def over(self, found: Measurement, accuracy_metric: str, refusal_metric: str) -> str:
        """Say why a measurement is over budget, with the metrics' names; empty if it is not. NaN in nats is over."""
        nats = (
            ("KL", found.kl, self.max_kl),
            (f"KL of the first {START_TOKENS} tokens", found.kl_first, self.max_kl_first),
        )
        shares = (
            (f"{accuracy_metric} {{:.1f}} points below the base", found.accuracy_drop, self.max_accuracy_drop),
            (f"{refusal_metric} {{:.1f}} points above the base", found.refusal_rise, self.max_refusal_rise),
        )
        reasons = [
            f"{name} {value:.3g} > {limit:g} nats"
            for name, value, limit in nats
            if limit is not None and not value <= limit
        ]
        reasons += [
            text.format(100 * value)
            for text, value, limit in shares
            if limit is not None and value is not None and not is_at_most(value, limit)
        ]
        return " and ".join(reasons)
