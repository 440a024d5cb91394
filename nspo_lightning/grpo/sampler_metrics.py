"""How much the program that drew the tokens differs from the policy that learns from them, under TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplerSums:
    """Sums over the tokens of some rows that add up over micro-batches; all tensors are scalars without gradient.

    Attributes:
        num_tokens: tokens that are trained on.
        difference_sum: absolute differences of the two log-probabilities, in nats.
        difference_max: the largest; 0 without tokens.
        ratio_sum: importance ratios, capped.
        ratio_min: the smallest; inf without tokens.
        ratio_max: the largest; -inf without tokens.
    """

    num_tokens: Tensor
    difference_sum: Tensor
    difference_max: Tensor
    ratio_sum: Tensor
    ratio_min: Tensor
    ratio_max: Tensor

    @classmethod
    def measure(cls, difference: Tensor, ratio: Tensor, mask: Tensor) -> SamplerSums:
        """Sum up some rows.

        Args:
            difference: shape (R, C), of log-probabilities.
            ratio: shape (R, C), importance ratios as they are used.
            mask: shape (R, C), bool, True = token that is trained on.

        Returns:
            The sums.
        """
        apart = torch.where(mask, difference.abs(), 0.0)
        return cls(
            num_tokens=mask.sum(),
            difference_sum=apart.sum(),
            difference_max=apart.max(),
            ratio_sum=torch.where(mask, ratio, 0.0).sum(),
            ratio_min=torch.where(mask, ratio, torch.inf).min(),
            ratio_max=torch.where(mask, ratio, -torch.inf).max(),
        )

    @classmethod
    def merge(cls, parts: Sequence[SamplerSums]) -> SamplerSums | None:
        """Add up micro-batches.

        Args:
            parts: of each; none where the policy drew the tokens itself.

        Returns:
            Their sums and extremes, or None without parts.
        """
        if not parts:
            return None
        return cls(
            num_tokens=torch.stack([part.num_tokens for part in parts]).sum(),
            difference_sum=torch.stack([part.difference_sum for part in parts]).sum(),
            difference_max=torch.stack([part.difference_max for part in parts]).max(),
            ratio_sum=torch.stack([part.ratio_sum for part in parts]).sum(),
            ratio_min=torch.stack([part.ratio_min for part in parts]).min(),
            ratio_max=torch.stack([part.ratio_max for part in parts]).max(),
        )

    def means(self) -> dict[str, Tensor]:
        """Turn the sums into what is logged.

        Returns:
            Scalars under TRL's names.
        """
        tokens = self.num_tokens.clamp(min=1)
        return {
            "sampling/sampling_logp_difference/mean": self.difference_sum / tokens,
            "sampling/sampling_logp_difference/max": self.difference_max,
            "sampling/importance_sampling_ratio/min": self.ratio_min.nan_to_num(posinf=1.0),
            "sampling/importance_sampling_ratio/mean": self.ratio_sum / tokens,
            "sampling/importance_sampling_ratio/max": self.ratio_max.nan_to_num(neginf=1.0),
        }
