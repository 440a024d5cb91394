"""What TensorBoard shows of a rollout, under TRL's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nspo_lightning.grpo import Rollout
from nspo_lightning.rewards import RewardResult


def rollout_metrics(
    rollout: Rollout, result: RewardResult, outcomes: Sequence[str | None]
) -> dict[str, Tensor | float]:
    """Sum up one judged rollout of R completions.

    Args:
        rollout: The completions.
        result: Their rewards.
        outcomes: What the judge calls each.

    Returns:
        `reward`, `reward_std` (mean over groups), `frac_reward_zero_std`, `completions/...`, `unsafe` (share of the
        judged completions), and each reward's own mean and deviation.
    """
    lengths = rollout.completion_mask.sum(1).float()
    finished = lengths[rollout.finished]
    groups = result.total.reshape(-1, rollout.group_size)
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num(0.0)
    counted = (~groups.isnan()).sum(1)
    deviation = (centred.square().sum(1) / (counted - 1).clamp(min=1)).sqrt()
    judged = [outcome for outcome in outcomes if outcome is not None]
    return {
        "reward": result.total.nanmean(),
        "unsafe": sum(outcome == "unsafe" for outcome in judged) / max(len(judged), 1),
        "reward_std": deviation.mean(),
        "frac_reward_zero_std": (deviation <= 1e-6).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": finished.mean() if len(finished) else torch.tensor(0.0),
        "completions/clipped_ratio": (~rollout.finished).float().mean(),
        **result.statistics(),
        **result.metrics,
    }
