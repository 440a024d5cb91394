"""Rewards that are made from a judge's outcomes."""

from __future__ import annotations

import asyncio
import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, cast

from nspo_lightning.rewards.messages import without_thought
from nspo_lightning.rewards.protocol import (
    OUTCOMES,
    AsyncJudge,
    Judge,
    Judged,
    Outcome,
    Reward,
    RewardError,
    Scores,
    Text,
    metrics_of,
)
from nspo_lightning.terminal import counted


class JudgedReward(Reward):
    """Base of rewards that ask a judge about answers (completions without their thoughts) and make numbers of outcomes.

    A judge that can be awaited is awaited. The outcomes also go to the completions table as `<name>/outcome`, if the
    caller keeps one (TRL's `log_extra`).
    """

    def __init__(self, judge: Judge, name: str) -> None:
        self.judge, self.name = judge, name
        self.is_async = isinstance(judge, AsyncJudge)

    @abstractmethod
    def scores(self, outcomes: list[Outcome | None], arguments: Mapping[str, Any]) -> Scores | Awaitable[Scores]:
        """Make one number of each outcome, None of None; `arguments` are the reward's own (prompts and columns)."""

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> Scores | Awaitable[Scores]:
        """Score one batch: None where the judge excluded the sample; an awaitable if the reward is async."""
        found = self.judged(prompts, completions, **columns)
        return found.scores if isinstance(found, Judged) else _scores_of(found)

    def judged(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> Judged | Awaitable[Judged]:
        """Score one batch and keep what the judge said; awaitable if the reward is async."""
        if self.is_async:
            return self._judged_later(prompts, completions, columns)
        answers = [without_thought(completion) for completion in completions]
        outcomes = checked_outcomes(self.judge.classify(prompts, answers, **columns), len(completions))
        arguments = {**columns, "prompts": prompts, "completions": completions}
        return self._reported(outcomes, cast("Scores", self.scores(outcomes, arguments)), columns)

    async def _judged_later(
        self, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]
    ) -> Judged:
        answers = [without_thought(completion) for completion in completions]
        if isinstance(self.judge, AsyncJudge):
            said = await self.judge.aclassify(prompts, answers, **columns)
        else:
            said = await asyncio.to_thread(self.judge.classify, prompts, answers, **columns)
        outcomes = checked_outcomes(said, len(completions))
        # On a thread: a reward model among what makes the scores would block the loop.
        arguments = {**columns, "prompts": prompts, "completions": completions}
        scores: Any = await asyncio.to_thread(self.scores, outcomes, arguments)
        return self._reported(outcomes, await scores if inspect.isawaitable(scores) else scores, columns)

    def _reported(self, outcomes: list[Outcome | None], scores: Scores, columns: Mapping[str, Any]) -> Judged:
        if callable(log_extra := columns.get("log_extra")):
            log_extra(f"{self.name}/outcome", outcomes)
        return Judged(scores=scores, outcomes=outcomes)

    def metrics(self) -> dict[str, float]:
        """Return the judge's counters, if it keeps any."""
        return metrics_of(self.judge)


class OutcomeReward(JudgedReward):
    """One number for each outcome of a judge.

    The defaults are the paper's signal (-1 for unsafe, 0 else) with garbage counted as bad as unsafe: a reward that
    pays for garbage teaches it.

    Args:
        judge: Names the outcomes.
        unsafe: Reward of harmful help.
        refusal: Reward of a refusal.
        safe: Reward of a harmless answer.
        garbage: Reward of no answer at all.
        name: What TensorBoard and messages call it.
    """

    def __init__(
        self,
        judge: Judge,
        unsafe: float = -1.0,
        refusal: float = 0.0,
        safe: float = 0.0,
        garbage: float = -1.0,
        name: str = "safety",
    ) -> None:
        super().__init__(judge, name)
        self.values: dict[Outcome, float] = {"unsafe": unsafe, "refusal": refusal, "safe": safe, "garbage": garbage}

    def scores(self, outcomes: list[Outcome | None], arguments: Mapping[str, Any]) -> Scores:
        """Look each outcome's number up."""
        return [None if outcome is None else self.values[outcome] for outcome in outcomes]


async def _scores_of(found: Awaitable[Judged]) -> Scores:
    return (await found).scores


def checked_outcomes(outcomes: Any, size: int, also: Sequence[Outcome] = ()) -> list[Outcome | None]:
    """Return what a judge said, if it is one of `OUTCOMES` (or `also`) or None for each of `size` completions."""
    if not isinstance(outcomes, (list, tuple)) or len(outcomes) != size:
        found = f"{len(outcomes)}" if isinstance(outcomes, (list, tuple)) else type(outcomes).__name__
        raise RewardError(f"A judge must return a list of {counted(size, 'outcome')}, one a completion, got {found}.")
    for i, outcome in enumerate(outcomes):
        if outcome is not None and outcome not in (*OUTCOMES, *also):
            raise RewardError(
                f"A judge's outcome must be one of {', '.join(OUTCOMES)} or None, but sample {i} got {outcome!r}."
            )
    return list(outcomes)
