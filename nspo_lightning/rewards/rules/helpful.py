"""Safety with a share for helpfulness on benign prompts mixed into the batch."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from nspo_lightning.rewards.arguments import is_async
from nspo_lightning.rewards.outcomes import ask, checked_outcomes, is_async_judge, judge_metrics, report_outcomes
from nspo_lightning.rewards.protocol import Judge, Outcome, Reward, RewardError, Scores, Text
from nspo_lightning.rewards.rules.harm_column import harmful_rows

__all__ = ["SafeAndHelpful"]


class SafeAndHelpful(Reward):
    """Safety on harmful prompts, helpfulness on benign ones.

    A reward that only punishes harm is best served by refusing everything. Here a benign prompt's completion earns
    `helpfulness` for being answered and nothing for a refusal, so a policy that refuses all loses that share:

        harmful prompt: unsafe -1, garbage -1, refusal and safe 0
        benign prompt:  unsafe -1, garbage -1, refusal 0, safe `helpfulness` (times the helpful reward, if given)

    Args:
        judge: names the outcomes.
        helpfulness: what answering a benign prompt is worth, beside the 1 that lies between unsafe and safe.
        helpful_reward: scores *how* helpful an answer is, best in [0, 1] (a reward model's sigmoid); by default any
            safe answer is as good as another. Called on the answered benign prompts only.
        harmful_column: column that says which prompts are harmful (see `harm_column.py`); without it all are.
        name: how TensorBoard and messages call it.
    """

    def __init__(
        self,
        judge: Judge,
        helpfulness: float = 0.5,
        helpful_reward: Reward | None = None,
        harmful_column: str = "kind",
        name: str = "safe_and_helpful",
    ) -> None:
        if not helpfulness > 0:
            raise ValueError(
                f"`helpfulness` must be positive, got {helpfulness}. Use OutcomeReward for a reward of safety alone."
            )
        self.judge, self.helpfulness, self.helpful_reward = judge, helpfulness, helpful_reward
        self.harmful_column, self.name = harmful_column, name
        self.is_async = is_async_judge(judge) or (
            helpful_reward is not None
            and (is_async(helpful_reward) or bool(getattr(helpful_reward, "is_async", False)))
        )

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> Scores | Awaitable[Scores]:
        """Score one batch.

        Args:
            prompts: one prompt a sample.
            completions: one completion a sample.
            **columns: `harmful_column` is read; all are passed on to the judge.

        Returns:
            A number for each, None where the judge (or the helpful reward) excluded the sample; awaitable if it waits
            for a server.
        """
        harmful = harmful_rows(self.harmful_column, columns, len(completions))
        if self.is_async:
            return self._later(prompts, completions, columns, harmful)
        outcomes = checked_outcomes(self.judge.classify(prompts, completions, **columns), len(completions))
        helped, arguments = _answered(outcomes, harmful, prompts, completions, columns)
        worth = self.helpful_reward(**arguments) if self.helpful_reward and helped else [1.0] * len(helped)
        report_outcomes(outcomes, self.name, columns)
        return self._scores(outcomes, helped, worth)

    def metrics(self) -> dict[str, float]:
        """Read the judge's counters, if it keeps any.

        Returns:
            Counter to value.
        """
        return judge_metrics(self.judge)

    async def _later(
        self, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any], harmful: list[bool]
    ) -> Scores:
        outcomes = await ask(self.judge, prompts, completions, columns)
        helped, arguments = _answered(outcomes, harmful, prompts, completions, columns)
        worth: Any = [1.0] * len(helped)
        if self.helpful_reward and helped:
            worth = await asyncio.to_thread(self.helpful_reward, **arguments)  # a model would block the loop
            worth = await worth if inspect.isawaitable(worth) else worth
        report_outcomes(outcomes, self.name, columns)
        return self._scores(outcomes, helped, worth)

    def _scores(self, outcomes: list[Outcome | None], helped: list[int], worth: Any) -> Scores:
        if len(worth) != len(helped):
            raise RewardError(
                f"`helpful_reward` must return {len(helped)} numbers, one a completion, got {len(worth)}.", self.name
            )
        shares: dict[int, float | None] = dict(zip(helped, worth, strict=True))
        scores: list[float | None] = []
        for i, outcome in enumerate(outcomes):
            share = shares.get(i, 0.0)
            if outcome is None or share is None:
                scores.append(None)
            else:
                scores.append(-1.0 if outcome in ("unsafe", "garbage") else self.helpfulness * share)
        return scores


def _answered(
    outcomes: list[Outcome | None],
    harmful: list[bool],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Any],
) -> tuple[list[int], dict[str, Any]]:
    """Pick the benign prompts that were answered.

    Returns:
        Their indices, and a reward's arguments for them alone.
    """
    helped = [i for i, outcome in enumerate(outcomes) if outcome == "safe" and not harmful[i]]
    arguments = {"prompts": prompts, "completions": completions} | dict(columns)
    picked = {
        key: [values[i] for i in helped] if isinstance(values, (list, tuple)) else values
        for key, values in arguments.items()
    }
    return helped, picked
