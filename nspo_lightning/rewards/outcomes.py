"""Numbers for a judge's outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from nspo_lightning.rewards.protocol import OUTCOMES, Judge, Outcome, Reward, RewardError, Scores, Text

__all__ = ["OutcomeReward", "ask", "checked_outcomes", "is_async_judge", "judge_metrics", "report_outcomes"]


class OutcomeReward(Reward):
    """One number for each outcome of a judge.

    The defaults are the paper's signal (-1 for unsafe, 0 else) with garbage counted as bad as unsafe: a reward that
    pays for garbage teaches it.

    Args:
        judge: what names the outcomes.
        unsafe: reward of harmful help.
        refusal: reward of a refusal.
        safe: reward of a harmless answer.
        garbage: reward of no answer at all.
        name: how TensorBoard and messages call it.
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
        self.judge = judge
        self.values: dict[Outcome, float] = {"unsafe": unsafe, "refusal": refusal, "safe": safe, "garbage": garbage}
        self.name = name
        self.is_async = is_async_judge(judge)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> Scores | Awaitable[Scores]:
        """Score one batch.

        Args:
            prompts: one prompt a sample.
            completions: one completion a sample.
            **columns: passed on to the judge.

        Returns:
            The outcome's number for each, None where the judge excluded the sample; awaitable if the judge is.
        """
        if self.is_async:
            return self._later(prompts, completions, columns)
        outcomes = checked_outcomes(self.judge.classify(prompts, completions, **columns), len(completions))
        return self._scores(outcomes, columns)

    async def _later(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]) -> Scores:
        return self._scores(await ask(self.judge, prompts, completions, columns), columns)

    def _scores(self, outcomes: list[Outcome | None], columns: Mapping[str, Any]) -> Scores:
        report_outcomes(outcomes, self.name, columns)
        return [None if outcome is None else self.values[outcome] for outcome in outcomes]

    def metrics(self) -> dict[str, float]:
        """Read the judge's counters, if it keeps any.

        Returns:
            Counter to value.
        """
        return judge_metrics(self.judge)


def is_async_judge(judge: Judge) -> bool:
    """Tell whether a judge can be awaited, so that several can wait for their servers at once.

    Args:
        judge: any judge.

    Returns:
        True if it has `aclassify`.
    """
    return callable(getattr(judge, "aclassify", None))


async def ask(
    judge: Judge, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]
) -> list[Outcome | None]:
    """Await any judge; one that computes does so on a thread.

    Args:
        judge: any judge.
        prompts: one prompt a sample.
        completions: one completion a sample.
        columns: the samples' other columns.

    Returns:
        One outcome a sample; None where it was excluded.
    """
    if is_async_judge(judge):
        outcomes = await judge.aclassify(prompts, completions, **columns)  # type: ignore[attr-defined]
    else:
        outcomes = await asyncio.to_thread(judge.classify, prompts, completions, **columns)
    return checked_outcomes(outcomes, len(completions))


def checked_outcomes(outcomes: Any, size: int) -> list[Outcome | None]:
    """Check what a judge said.

    Args:
        outcomes: what `classify` returned.
        size: how many there must be.

    Returns:
        The outcomes.

    Raises:
        RewardError: if there are too many or few, or one is no outcome.
    """
    if not isinstance(outcomes, (list, tuple)) or len(outcomes) != size:
        found = f"{len(outcomes)}" if isinstance(outcomes, (list, tuple)) else type(outcomes).__name__
        raise RewardError(f"A judge must return a list of {size} outcomes, one a completion, got {found}.")
    for i, outcome in enumerate(outcomes):
        if outcome is not None and outcome not in OUTCOMES:
            raise RewardError(
                f"A judge's outcome must be one of {', '.join(OUTCOMES)} or None, but sample {i} got {outcome!r}."
            )
    return list(outcomes)


def report_outcomes(outcomes: list[Outcome | None], name: str, columns: Mapping[str, Any]) -> None:
    """Hand the outcomes to the completions table, if the caller keeps one (TRL's `log_extra`).

    Args:
        outcomes: what the judge said.
        name: the reward's name.
        columns: the reward's keyword arguments.
    """
    if callable(log_extra := columns.get("log_extra")):
        log_extra(f"{name}/outcome", outcomes)


def judge_metrics(judge: Judge) -> dict[str, float]:
    """Read a judge's counters, if it keeps any.

    Args:
        judge: any judge.

    Returns:
        Counter to value.
    """
    counters = getattr(judge, "metrics", None)
    return dict(counters()) if callable(counters) else {}
