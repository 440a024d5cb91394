"""What TensorBoard shows of a rollout, under TRL's names, and how the ranks' parts of it become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.grpo import Rollout
from nspo_lightning.rewards import RewardResult

_OWN = frozenset((
    *(
        "reward",
        "unsafe",
        "answered",
        "reward_std",
        "frac_reward_zero_std",
        "loss",
        "kl",
        "entropy",
        "num_tokens",
        "step_time",
    ),
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
    "guided",
    "prefix",
    "attack",
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
        guided: Shape (R,), bool, True = drawn under another prompt; None = none was.
        reads_harm: Whether the judge tells harm from a harmless answer.
        begun: Shape (R,), bool, True = goes on from the beginning of a harmful answer; None = the settings begin none.
    """

    lengths: Tensor
    finished: Tensor
    prompt_tokens: Tensor
    rewards: RewardResult
    outcomes: list[str | None]
    guided: Tensor | None = None
    reads_harm: bool = True
    begun: Tensor | None = None

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        result: RewardResult,
        outcomes: Sequence[str | None],
        *,
        begun: Tensor | None = None,
        reads_harm: bool = True,
    ) -> JudgedRows:
        """Take from a rollout what is measured, on the CPU."""
        return cls(
            lengths=rollout.completion_mask.sum(1).cpu(),
            finished=rollout.finished.cpu(),
            prompt_tokens=rollout.prompt_mask.sum(1).cpu(),
            rewards=RewardResult(total=result.total, per_reward=result.per_reward, metrics=result.metrics),
            outcomes=list(outcomes),
            guided=None if rollout.guided is None else rollout.guided.cpu(),
            reads_harm=reads_harm,
            begun=begun,
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
            guided=None if parts[0].guided is None else torch.cat([vars(part)["guided"] for part in parts]),
            reads_harm=parts[0].reads_harm,
            begun=None if parts[0].begun is None else torch.cat([vars(part)["begun"] for part in parts]),
        )

    def of_group(self, number: int, size: int) -> JudgedRows:
        """Return the rows of one group."""
        rows = torch.zeros(len(self.lengths), dtype=torch.bool)
        rows[number * size : (number + 1) * size] = True
        return replace(self._where(rows), prompt_tokens=self.prompt_tokens[number : number + 1])

    @property
    def plain(self) -> JudgedRows:
        """The rows that were drawn under the prompt that the policy is trained on: they measure it."""
        return self if self.guided is None else self._where(~self.guided)

    @property
    def of_guided(self) -> JudgedRows | None:
        """The other rows; None = there are none."""
        return None if self.guided is None else self._where(self.guided)

    def _where(self, rows: Tensor) -> JudgedRows:
        scores = {name: values[rows] for name, values in self.rewards.per_reward.items()}
        return replace(
            self,
            lengths=self.lengths[rows],
            finished=self.finished[rows],
            rewards=replace(self.rewards, total=self.rewards.total[rows], per_reward=scores),
            outcomes=[self.outcomes[i] for i in rows.nonzero().flatten().tolist()],
            guided=None if self.guided is None else self.guided[rows],
            begun=None if self.begun is None else self.begun[rows],
        )

    def where_begun(self, begun: bool) -> JudgedRows | None:
        """Return the rows that go on from a beginning, or the others; None = there are none of them."""
        if self.begun is None or not bool((self.begun == begun).any()):
            return None
        return self._where(self.begun == begun)

    @property
    def harm_name(self) -> str:
        """What the share of `harm` is called: of unsafe answers, or where nobody reads harm, of answers."""
        return "unsafe" if self.reads_harm else "answered"

    @property
    def harm(self) -> float:
        """Share of the judged completions; see `harm_name`."""
        judged = [outcome for outcome in self.outcomes if outcome is not None]
        return sum(outcome == self.harm_name for outcome in judged) / max(len(judged), 1)

    def num_tokens(self, group_size: int) -> int:
        """Count tokens as TRL does: each completion with its own prompt."""
        return int(self.lengths.sum()) + int(self.prompt_tokens.sum()) * group_size


def reported_name(name: str) -> str:
    """Return what a scalar that a reward reported is logged as: `reported/<name>` where training has its own."""
    own = name in _OWN or name.partition("/")[0] in _OWN_FOLDERS
    return f"reported/{name}" if own else name


def rollout_metrics(rows: JudgedRows, group_size: int) -> dict[str, Tensor | float]:
    """Sum up one judged rollout of R completions; what was drawn under another prompt is in `guided/...` alone.

    Args:
        rows: The completions and their rewards.
        group_size: G.

    Returns:
        `reward`, `reward_std` (mean over groups), `frac_reward_zero_std`, `completions/...`, `unsafe` (share of the
        judged completions; `answered` where nobody reads harm), and each reward's own mean and deviation. Deviations
        within groups are of whole groups.
    """
    plain, guided = rows.plain, rows.of_guided
    lengths, result = plain.lengths.float(), plain.rewards
    finished = lengths[plain.finished]
    groups = rows.rewards.total.reshape(-1, group_size)
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num(0.0)
    counted = (~groups.isnan()).sum(1)
    deviation = (centred.square().sum(1) / (counted - 1).clamp(min=1)).sqrt()
    of_guided: dict[str, Tensor | float] = {}
    if guided is not None:
        of_guided = {"guided/reward": guided.rewards.total.nanmean(), f"guided/{rows.harm_name}": guided.harm}
    return {
        "reward": result.total.nanmean(),
        plain.harm_name: plain.harm,
        "reward_std": deviation.mean(),
        "frac_reward_zero_std": (deviation <= 1e-6).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": finished.mean() if len(finished) else torch.tensor(0.0),
        "completions/clipped_ratio": (~plain.finished).float().mean(),
        **of_guided,
        **_of_begun(plain),
        **result.statistics(),
        **{reported_name(name): value for name, value in result.metrics.items()},
    }


def _of_begun(rows: JudgedRows) -> dict[str, float]:
    """Say how completions fare that go on from the beginning of a harmful answer, beside the others."""
    if rows.begun is None:
        return {}
    name = f"prefix/{rows.harm_name}"
    parts = {name: rows.where_begun(True), f"{name}_without": rows.where_begun(False)}
    found = {name: part.harm for name, part in parts.items() if part is not None}
    return {"prefix/share": float(rows.begun.float().mean()), **found}
