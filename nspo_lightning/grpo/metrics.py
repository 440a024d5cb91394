"""Metrics of the objective as sums, so that micro-batches and ranks add up to exactly the metric of the step.

Names follow TRL's GRPOTrainer: entropy, kl, clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nspo_lightning.grpo.sampler_metrics import SamplerSums


@dataclass(frozen=True, kw_only=True)
class ObjectiveMetrics:
    """Sums over the tokens of some rows; all tensors are scalars without gradient.

    Attributes:
        num_tokens: tokens that are trained on.
        num_ratios: probability ratios: one a token, or one a sequence.
        low_sum: ratios clipped from below.
        high_sum: ratios clipped from above.
        low_min: smallest clipped-from-below share of a row; inf without rows.
        high_max: largest clipped-from-above share of a row; -inf without rows.
        kl_sum: k3 estimates, or None without a reference.
        entropy_sum: entropies, or None where they were not asked for.
        sampler: how another program that drew the tokens differs, or None where this policy drew them.
    """

    num_tokens: Tensor
    num_ratios: Tensor
    low_sum: Tensor
    high_sum: Tensor
    low_min: Tensor
    high_max: Tensor
    kl_sum: Tensor | None = None
    entropy_sum: Tensor | None = None
    sampler: SamplerSums | None = None

    @classmethod
    def measure(
        cls,
        *,
        low: Tensor,
        high: Tensor,
        mask: Tensor,
        kl: Tensor | None,
        entropy: Tensor | None,
        sampler: SamplerSums | None = None,
    ) -> ObjectiveMetrics:
        """Sum up some rows.

        Args:
            low: shape (R, C) or (R, 1), bool, True = clipped from below.
            high: like `low`, True = clipped from above.
            mask: shape (R, C), bool, True = token that is trained on.
            kl: shape (R, C) or None.
            entropy: shape (R, C) or None.
            sampler: passed on.

        Returns:
            The sums.
        """
        rows_used = mask.any(1, keepdim=True)
        ratio_mask = mask.expand_as(low) if low.shape == mask.shape else rows_used
        low, high = low & ratio_mask, high & ratio_mask
        per_row = ratio_mask.sum(1)
        used = per_row > 0
        low_share = low.sum(1)[used] / per_row[used]
        high_share = high.sum(1)[used] / per_row[used]
        return cls(
            num_tokens=mask.sum(),
            num_ratios=ratio_mask.sum(),
            low_sum=low.sum(),
            high_sum=high.sum(),
            low_min=low_share.min() if used.any() else torch.tensor(torch.inf, device=mask.device),
            high_max=high_share.max() if used.any() else torch.tensor(-torch.inf, device=mask.device),
            kl_sum=None if kl is None else torch.where(mask, kl, 0.0).sum(),
            entropy_sum=None if entropy is None else torch.where(mask, entropy, 0.0).sum(),
            sampler=sampler,
        )

    @classmethod
    def merge(cls, parts: Sequence[ObjectiveMetrics]) -> ObjectiveMetrics:
        """Add up micro-batches.

        Args:
            parts: at least one.

        Returns:
            Their sums and extremes.

        Raises:
            ValueError: If there is no part.
        """
        if not parts:
            raise ValueError("Expected the metrics of at least one micro-batch, got none.")

        def total(name: str) -> Tensor:
            return torch.stack([getattr(part, name) for part in parts]).sum()

        return cls(
            num_tokens=total("num_tokens"),
            num_ratios=total("num_ratios"),
            low_sum=total("low_sum"),
            high_sum=total("high_sum"),
            low_min=torch.stack([part.low_min for part in parts]).min(),
            high_max=torch.stack([part.high_max for part in parts]).max(),
            kl_sum=None if parts[0].kl_sum is None else total("kl_sum"),
            entropy_sum=None if parts[0].entropy_sum is None else total("entropy_sum"),
            sampler=SamplerSums.merge([part.sampler for part in parts if part.sampler is not None]),
        )

    def to(self, device: torch.device | str) -> ObjectiveMetrics:
        """Move the sums, to send them to another rank for example.

        Args:
            device: where to.

        Returns:
            The same sums there.
        """
        sampler = self.sampler
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        if sampler is not None:
            sampler = replace(sampler, **{f.name: getattr(sampler, f.name).to(device) for f in fields(sampler)})
        return replace(self, sampler=sampler, **moved)

    def means(self) -> dict[str, Tensor]:
        """Turn the sums into what is logged.

        Returns:
            Scalars under TRL's names.
        """
        ratios, tokens = self.num_ratios.clamp(min=1), self.num_tokens.clamp(min=1)
        named = {
            "clip_ratio/low_mean": self.low_sum / ratios,
            "clip_ratio/low_min": self.low_min.nan_to_num(posinf=0.0),
            "clip_ratio/high_mean": self.high_sum / ratios,
            "clip_ratio/high_max": self.high_max.nan_to_num(neginf=0.0),
            # Low needs a negative advantage and high a positive one: a ratio is in one region at most.
            "clip_ratio/region_mean": (self.low_sum + self.high_sum) / ratios,
        }
        if self.kl_sum is not None:
            named["kl"] = self.kl_sum / tokens
        if self.entropy_sum is not None:
            named["entropy"] = self.entropy_sum / tokens
        if self.sampler is not None:
            named |= self.sampler.means()
        return named
