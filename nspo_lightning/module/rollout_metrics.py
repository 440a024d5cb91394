"""What TensorBoard shows of a rollout, under TRL's names, and how the ranks' parts of it become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.grpo import Rollout
from nspo_lightning.rewards import RewardResult

_OWN = frozenset((
    *("reward", "unsafe", "reward_std", "frac_reward_zero_std", "loss", "kl", "entropy", "num_tokens", "step_time"),
    *("updates_skipped", "updates_nonfinite", "epoch", "step"),
))
_OWN_FOLDERS = frozenset((
    "completions",
    "rewards",
    "rollout",
    "clip_ratio",
    "sampling",
    "safety",
    "general",
    "nullspace",
    "guard",
    "compare",
    "dynamic",
))
"""Metrics of training itself; callbacks stop a run, or choose a checkpoint, by some of them."""


@dataclass(frozen=True, kw_only=True)
class JudgedRows:
    """What is measured of R judged completions; small enough to be sent to all ranks.

    Attributes:
        lengths: Shape (R,), tokens.
        finished: Shape (R,), bool, ended by EOS.
        prompt_tokens: Shape (P,), tokens.
        rewards: Totals and each reward's own scores, B = R, and the scalars that they reported.
        outcomes: What the judge calls each.
    """

    lengths: Tensor
    finished: Tensor
    prompt_tokens: Tensor
    rewards: RewardResult
    outcomes: list[str | None]

    @classmethod
    def of(cls, rollout: Rollout, result: RewardResult, outcomes: Sequence[str | None]) -> JudgedRows:
        """Take from a rollout what is measured, on the CPU."""
        return cls(
            lengths=rollout.completion_mask.sum(1).cpu(),
            finished=rollout.finished.cpu(),
            prompt_tokens=rollout.prompt_mask.sum(1).cpu(),
            rewards=RewardResult(total=result.total, per_reward=result.per_reward, metrics=result.metrics),
            outcomes=list(outcomes),
        )

    def of_all_ranks(self) -> JudgedRows:
        """Put the rows of all ranks together, rank by rank (cross-rank synchronisation)."""
        return self.joined(ranks.gather_objects(self))

    @classmethod
    def joined(cls, parts: Sequence[JudgedRows]) -> JudgedRows:
        """Put the rows of several parts together, at least one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            lengths=torch.cat([part.lengths for part in parts]),
            finished=torch.cat([part.finished for part in parts]),
            prompt_tokens=torch.cat([part.prompt_tokens for part in parts]),
            rewards=RewardResult.joined([part.rewards for part in parts]),
            outcomes=[outcome for part in parts for outcome in part.outcomes],
        )

    def of_group(self, number: int, size: int) -> JudgedRows:
        """Return the rows of one group."""
        rows = slice(number * size, (number + 1) * size)
        scores = {name: values[rows] for name, values in self.rewards.per_reward.items()}
        return JudgedRows(
            lengths=self.lengths[rows],
            finished=self.finished[rows],
            prompt_tokens=self.prompt_tokens[number : number + 1],
            rewards=RewardResult(total=self.rewards.total[rows], per_reward=scores),
            outcomes=self.outcomes[rows],
        )

    def num_tokens(self, group_size: int) -> int:
        """Count tokens as TRL does: each completion with its own prompt."""
        return int(self.lengths.sum()) + int(self.prompt_tokens.sum()) * group_size


def reported_name(name: str) -> str:
    """Return what a scalar that a reward reported is logged as: `reported/<name>` where training has its own."""
    own = name in _OWN or name.partition("/")[0] in _OWN_FOLDERS
    return f"reported/{name}" if own else name


def rollout_metrics(rows: JudgedRows, group_size: int) -> dict[str, Tensor | float]:
    """Sum up one judged rollout of R completions.

    Args:
        rows: The completions and their rewards.
        group_size: G.

    Returns:
        `reward`, `reward_std` (mean over groups), `frac_reward_zero_std`, `completions/...`, `unsafe` (share of the
        judged completions), and each reward's own mean and deviation.
    """
    lengths, result = rows.lengths.float(), rows.rewards
    finished = lengths[rows.finished]
    groups = result.total.reshape(-1, group_size)
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num(0.0)
    counted = (~groups.isnan()).sum(1)
    deviation = (centred.square().sum(1) / (counted - 1).clamp(min=1)).sqrt()
    judged = [outcome for outcome in rows.outcomes if outcome is not None]
    return {
        "reward": result.total.nanmean(),
        "unsafe": sum(outcome == "unsafe" for outcome in judged) / max(len(judged), 1),
        "reward_std": deviation.mean(),
        "frac_reward_zero_std": (deviation <= 1e-6).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": finished.mean() if len(finished) else torch.tensor(0.0),
        "completions/clipped_ratio": (~rows.finished).float().mean(),
        **result.statistics(),
        **{reported_name(name): value for name, value in result.metrics.items()},
    }
