"""Metrics of the objective as sums, so that micro-batches and ranks add up to exactly the metric of the step.

Names follow TRL's GRPOTrainer: entropy, kl, clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean}, and
sampling/... for how much the program that drew the tokens differs from the policy that learns from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo_lightning.grpo.records import map_tensors

SMALL = 0.1
"""Importance ratios below it teach next to nothing."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveMetrics:
    """Sums over the tokens of some rows; all tensors are scalars without gradient.

    Fields are summed over micro-batches, those that end in ``_min`` or ``_max`` take the extreme.

    Attributes:
        num_tokens: Tokens that are trained on.
        num_ratios: Probability ratios: one a token, or one a sequence.
        low_sum: Ratios clipped from below.
        high_sum: Ratios clipped from above.
        low_min: Smallest clipped-from-below share of a row; inf without rows.
        high_max: Largest clipped-from-above share of a row; -inf without rows.
        kl_sum: K3 estimates, or None without a reference.
        entropy_sum: Entropies, or None where they were not asked for.
        difference_sum: Absolute differences between the policy's log-probabilities and those of another program that
            drew the tokens, in nats. This and what follows is None where the policy drew them itself.
        difference_max: The largest difference; 0 without tokens.
        importance_sum: Importance ratios, capped.
        importance_min: The smallest; inf without tokens.
        importance_max: The largest; -inf without tokens.
        guided_tokens: Tokens that were drawn under another prompt, which are in none of the five before. This and what
            follows is None where none was.
        guided_sum: Their importance ratios, capped.
        guided_capped: Of them, those whose ratio is above the cap.
        guided_small: Of them, those whose ratio is below `SMALL`.
    """

    num_tokens: Tensor
    num_ratios: Tensor
    low_sum: Tensor
    high_sum: Tensor
    low_min: Tensor
    high_max: Tensor
    kl_sum: Tensor | None = None
    entropy_sum: Tensor | None = None
    difference_sum: Tensor | None = None
    difference_max: Tensor | None = None
    importance_sum: Tensor | None = None
    importance_min: Tensor | None = None
    importance_max: Tensor | None = None
    guided_tokens: Tensor | None = None
    guided_sum: Tensor | None = None
    guided_capped: Tensor | None = None
    guided_small: Tensor | None = None

    @classmethod
    def measure(
        cls,
        *,
        low: Tensor,
        high: Tensor,
        mask: Tensor,
        kl: Tensor | None,
        entropy: Tensor | None,
        difference: Tensor | None = None,
        importance: Tensor | None = None,
        guided: Tensor | None = None,
        cap: float | None = None,
    ) -> ObjectiveMetrics:
        """Sum up some rows.

        Args:
            low: Shape (R, C) or (R, 1), bool, True = clipped from below.
            high: Like `low`, True = clipped from above.
            mask: Shape (R, C), bool, True = token that is trained on.
            kl: Shape (R, C) or None.
            entropy: Shape (R, C) or None.
            difference: Shape (R, C), of log-probabilities to the sampler's, or None.
            importance: Shape (R, C), importance ratios as they are used, or None.
            guided: Shape (R,), bool, True = drawn under another prompt, or None.
            cap: The largest importance ratio; None = no bound.

        Returns:
            The sums.
        """
        ratio_mask = mask.expand_as(low) if low.shape == mask.shape else mask.any(1, keepdim=True)
        low, high = low & ratio_mask, high & ratio_mask
        per_row = ratio_mask.sum(1)
        low_share, high_share = low.sum(1) / per_row, high.sum(1) / per_row

        own = mask if guided is None else mask & ~guided[:, None]

        def over_tokens(values: Tensor | None, elsewhere: float = 0.0, among: Tensor = mask) -> Tensor | None:
            return None if values is None else torch.where(among, values, elsewhere)

        def of_guided(values: Tensor) -> Tensor | None:
            return None if guided is None else torch.where(mask & guided[:, None], values, 0.0).sum()

        def total(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.sum()

        apart = over_tokens(None if difference is None else difference.abs(), among=own)
        smallest, largest = over_tokens(importance, torch.inf, own), over_tokens(importance, -torch.inf, own)
        one = torch.ones_like(mask, dtype=torch.float32)
        above = one if difference is None else difference > (math.inf if cap is None else math.log(cap))
        ratio = one if importance is None else importance
        return cls(
            num_tokens=mask.sum(),
            num_ratios=ratio_mask.sum(),
            low_sum=low.sum(),
            high_sum=high.sum(),
            low_min=torch.where(per_row > 0, low_share, torch.inf).min(),
            high_max=torch.where(per_row > 0, high_share, -torch.inf).max(),
            kl_sum=total(over_tokens(kl)),
            entropy_sum=total(over_tokens(entropy)),
            difference_sum=total(apart),
            difference_max=None if apart is None else apart.max(),
            importance_sum=total(over_tokens(importance, among=own)),
            importance_min=None if smallest is None else smallest.min(),
            importance_max=None if largest is None else largest.max(),
            guided_tokens=of_guided(one),
            guided_sum=of_guided(ratio),
            guided_capped=of_guided(above.float()),
            guided_small=of_guided((ratio < SMALL).float()),
        )

    @classmethod
    def merge(cls, parts: Sequence[ObjectiveMetrics]) -> ObjectiveMetrics:
        """Add up the metrics of micro-batches, at least one; all were measured with the same optional tensors."""
        if not parts:
            raise ValueError("Expected the metrics of at least one micro-batch, got none.")

        def merged(name: str) -> Tensor:
            values = torch.stack([vars(part)[name] for part in parts])
            if name.endswith("_min"):
                return values.min()
            return values.max() if name.endswith("_max") else values.sum()

        return cls(**{name: merged(name) for name, value in vars(parts[0]).items() if value is not None})

    def to(self, device: torch.device | str) -> ObjectiveMetrics:
        """Return the same sums on a device, to send them to another rank for example."""
        return map_tensors(self, lambda tensor: tensor.to(device))

    def means(self) -> dict[str, Tensor]:
        """Turn the sums into what is logged: scalars under TRL's names."""
        ratios, tokens = self.num_ratios.clamp(min=1), self.num_tokens.clamp(min=1)
        smallest, largest = self.importance_min, self.importance_max
        guided = None if self.guided_tokens is None else self.guided_tokens.clamp(min=1)
        own = tokens if self.guided_tokens is None else (self.num_tokens - self.guided_tokens).clamp(min=1)
        named: dict[str, Tensor | None] = {
            "clip_ratio/low_mean": self.low_sum / ratios,
            "clip_ratio/low_min": self.low_min.nan_to_num(posinf=0.0),
            "clip_ratio/high_mean": self.high_sum / ratios,
            "clip_ratio/high_max": self.high_max.nan_to_num(neginf=0.0),
            # Low needs a negative advantage and high a positive one: a ratio is in one region at most.
            "clip_ratio/region_mean": (self.low_sum + self.high_sum) / ratios,
            "kl": _ratio(self.kl_sum, tokens),
            "entropy": _ratio(self.entropy_sum, tokens),
            "sampling/sampling_logp_difference/mean": _ratio(self.difference_sum, own),
            "sampling/sampling_logp_difference/max": self.difference_max,
            "sampling/importance_sampling_ratio/min": None if smallest is None else smallest.nan_to_num(posinf=1.0),
            "sampling/importance_sampling_ratio/mean": _ratio(self.importance_sum, own),
            "sampling/importance_sampling_ratio/max": None if largest is None else largest.nan_to_num(neginf=1.0),
            "guided/importance_ratio": _ratio(self.guided_sum, guided),
            "guided/ratio_capped": _ratio(self.guided_capped, guided),
            "guided/ratio_small": _ratio(self.guided_small, guided),
        }
        return {name: value for name, value in named.items() if value is not None}


def _ratio(total: Tensor | None, count: Tensor | None) -> Tensor | None:
    return None if total is None or count is None else total / count
