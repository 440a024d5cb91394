"""Whether groups have a signal to learn from: the counts, and what is said and done where none has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nspo_lightning.evaluation.diagnosis import SIGNAL_CURES, TrainingFacts
from nspo_lightning.grpo import group_advantages
from nspo_lightning.module.rollout_metrics import JudgedRows
from nspo_lightning.terminal import counted

WARNED_AFTER = 3
"""Rollouts from the start of a run without one signal, after which it is warned of."""
STILL_SAFE = 0.05
"""Share of unsafe answers and garbage up to which a policy without a signal counts as safe already."""
_PREFIX = "_signal_"
_COUNTED = ("with_signal", "groups", "groups_with_signal", "completions", "cut", "low", "high", "told")


class NoSignalError(ValueError):
    """No group of many rollouts had a signal, and nothing could be learnt from them."""

    fails_again = True
    raised_on_all_ranks = True
    """All have seen the same rewards."""


def groups_with_signal(rows: JudgedRows, group_size: int, *, mask_truncated: bool) -> Tensor:
    """Return which groups of R = P * G completions have a gradient by their rewards.

    Args:
        rows: Their lengths, ends and rewards.
        group_size: G.
        mask_truncated: Whether completions that the length limit cut are left out.

    Returns:
        Shape (P,), bool, True = a completion that is trained on differs from the mean of its group.
    """
    trained = (rows.lengths > 0) & (rows.finished | (not mask_truncated))
    differs = group_advantages(rows.rewards.total, group_size, "none") != 0
    return (trained & differs).view(-1, group_size).any(dim=1)


@dataclass(kw_only=True)
class Stretch:
    """Counts over the rollouts since the last one with a signal.

    Attributes:
        rollouts: Number of these rollouts.
        groups: Groups in them, one a prompt.
        left_out: Groups whose rewards differ, but only in completions that `mask_truncated` leaves out.
        completions: Completions with a reward.
        judged: Completions with an outcome.
        reads_harm: Whether the judge tells harm from a harmless answer.
        unsafe: Judged completions that are unsafe.
        answered: Judged completions that answer, where the judge does not read harm.
        refused: Judged completions that refuse.
        garbage: Judged completions that are garbage.
        reward: Sum of the rewards.
        low: The lowest reward; None = none yet.
    """

    rollouts: int = 0
    groups: int = 0
    left_out: int = 0
    completions: int = 0
    judged: int = 0
    reads_harm: bool = True
    unsafe: int = 0
    answered: int = 0
    refused: int = 0
    garbage: int = 0
    reward: float = 0.0
    low: float | None = None

    def add(self, rows: JudgedRows, group_size: int) -> None:
        """Count a rollout without a signal."""
        plain = rows.plain
        rewards = plain.rewards.total[plain.rewards.total.isfinite()]
        spread = groups_with_signal(rows, group_size, mask_truncated=False)
        self.rollouts += 1
        self.groups += len(spread)
        self.left_out += int(spread.sum())
        self.completions += len(rewards)
        self.judged += sum(outcome is not None for outcome in plain.outcomes)
        self.reads_harm = rows.reads_harm
        self.unsafe += plain.outcomes.count("unsafe")
        self.answered += plain.outcomes.count("answered")
        self.refused += plain.outcomes.count("refusal")
        self.garbage += plain.outcomes.count("garbage")
        self.reward += float(rewards.sum())
        lows = [*rewards.tolist(), *([] if self.low is None else [self.low])]
        self.low = min(lows) if lows else None

    def describe(self) -> str:
        """Say the rates that were seen."""
        judged = max(self.judged, 1)
        harm = f"{self.unsafe / judged:.1%} of {counted(self.judged, 'answer')} unsafe"
        if not self.reads_harm:
            harm = f"{self.answered / judged:.1%} of {counted(self.judged, 'prompt')} answered"
        cut = (
            f"; {counted(self.left_out, 'group differs', 'groups differ')} only where `mask_truncated` leaves out"
            if self.left_out
            else ""
        )
        return (
            f"{counted(self.groups, 'group')} without spread, mean reward "
            f"{self.reward / max(self.completions, 1):.3g}, {harm}, {self.refused / judged:.1%} refused{cut}"
        )


@dataclass(kw_only=True)
class Signal:
    """Counts rollouts without a signal.

    Attributes:
        max_without: Rollouts in a row without a signal, before a run ends; None = it never does.
        cures: What may give a signal, as a sentence's end.
        with_signal: Rollouts of this run with a signal.
        groups: Groups in all rollouts of this run with a score, one a prompt.
        groups_with_signal: Groups among them whose rewards differ.
        completions: Completions in these groups.
        cut: Completions among them that ran to the length limit.
        low: The lowest reward of the run; None = none yet.
        high: The highest.
        told: Whether the warning was given that the policy is safe already.
        stretch: The rollouts since the last signal.
    """

    max_without: int | None = None
    cures: str = SIGNAL_CURES
    with_signal: int = 0
    groups: int = 0
    groups_with_signal: int = 0
    completions: int = 0
    cut: int = 0
    low: float | None = None
    high: float | None = None
    told: bool = False
    stretch: Stretch = field(default_factory=Stretch)

    @property
    def is_safe(self) -> bool:
        """Whether there is nothing left to learn: hardly a bad answer, or none but the best reward of the run."""
        stretch = self.stretch
        if stretch.judged and stretch.reads_harm and stretch.unsafe + stretch.garbage <= STILL_SAFE * stretch.judged:
            return True
        known = self.low is not None and self.high is not None and stretch.low is not None
        return known and self.low < self.high <= stretch.low  # type: ignore[operator]

    def facts(self, max_new_tokens: int) -> TrainingFacts:
        """Return the counts for a diagnosis, without those of updates; the length limit is that of sampling."""
        return TrainingFacts(
            groups=self.groups,
            with_signal=self.groups_with_signal,
            low=self.low,
            high=self.high,
            completions=self.completions,
            cut=self.cut,
            max_new_tokens=max_new_tokens,
            safe=self.is_safe,
        )

    def count(self, rows: JudgedRows, group_size: int, *, mask_truncated: bool) -> None:
        """Count a rollout, and see whether there is anything to learn; ranks must ask with the same, of all ranks.

        One without any score is left to `ScoredRollouts`.

        Raises:
            NoSignalError: If too many in a row had no signal, and the policy isn't safe already.
        """
        rewards = rows.rewards.total[rows.rewards.total.isfinite()]
        if not len(rewards):
            return
        seen = [*rewards.tolist(), *(end for end in (self.low, self.high) if end is not None)]
        self.low, self.high = min(seen), max(seen)
        found = groups_with_signal(rows, group_size, mask_truncated=mask_truncated)
        self.groups, self.groups_with_signal = self.groups + len(found), self.groups_with_signal + int(found.sum())
        self.completions, self.cut = self.completions + len(rows.lengths), self.cut + int((~rows.finished).sum())
        if bool(found.any()):
            self.with_signal, self.stretch = self.with_signal + 1, Stretch()
            return
        self.stretch.add(rows, group_size)
        number, limit = self.stretch.rollouts, self.max_without
        if limit is not None and number >= limit and not self.is_safe:
            raise NoSignalError(
                f"No group had a signal in {counted(number, 'rollout', 'rollouts in a row')} "
                "(`max_rollouts_without_signal`): all answers to a prompt got the same reward, and nothing was "
                f"learnt from them ({self.stretch.describe()}). The last checkpoint stands. {self.cures}"
            )
        first = self.with_signal == 0 and number == WARNED_AFTER
        if self.is_safe and not self.told and (first or (limit is not None and number >= limit)):
            self.told = True
            reached = "policy is safe already on these prompts"
            if not self.stretch.reads_harm:
                reached = "reward is the best that the run has seen"
            rank_zero_warn(
                f"No group had a signal in {counted(number, 'rollout', 'rollouts in a row')}, and there is little "
                f"left to learn: the {reached} ({self.stretch.describe()}). The run goes on; a step without a "
                "signal moves no weight (`updates_skipped`). `model.dynamic_sampling` looks for prompts that have one."
            )
        elif first and not self.is_safe:
            ends_after = f" After {counted(limit, 'such rollout')} in a row the run ends." if limit is not None else ""
            rank_zero_warn(
                f"No group had a signal in the first {number} rollouts: all answers to a prompt got the same reward "
                f"({self.stretch.describe()}), so there was no update (`updates_skipped`).{ends_after} {self.cures}"
            )

    def check_end(self) -> None:
        """See when training is over whether there was any signal.

        Raises:
            NoSignalError: If there was none in more than a few rollouts, the policy isn't safe, and there is a limit.
        """
        if self.max_without is None or self.with_signal or self.stretch.rollouts < WARNED_AFTER or self.is_safe:
            return
        raise NoSignalError(
            f"Nothing was learnt: no group of {self.stretch.rollouts} rollouts had a signal "
            f"({self.stretch.describe()}). {self.cures}"
        )

    def to_counters(self) -> dict[str, Any]:
        """Return plain values under the names that checkpoints have for them."""
        own = {name: value for name, value in vars(self).items() if name not in {"max_without", "cures", "stretch"}}
        return {_PREFIX + name: value for name, value in {**own, **_in_stretch(asdict(self.stretch))}.items()}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Go on from what `to_counters` returned, among others; earlier checkpoints hold none."""
        found = {name.removeprefix(_PREFIX): value for name, value in counters.items() if name.startswith(_PREFIX)}
        for name in _COUNTED:
            setattr(self, name, found.get(name, getattr(type(self), name)))
        names = [one.name for one in fields(Stretch)]
        self.stretch = Stretch(**{name: found[f"stretch_{name}"] for name in names if f"stretch_{name}" in found})


def _in_stretch(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"stretch_{name}": value for name, value in values.items()}
