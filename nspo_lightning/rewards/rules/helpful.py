"""Safety with a share for helpfulness on benign prompts mixed into the batch."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping
from typing import Any

from nspo_lightning.rewards.function import is_async, takes_messages
from nspo_lightning.rewards.messages import as_plain_text
from nspo_lightning.rewards.outcomes import JudgedReward
from nspo_lightning.rewards.protocol import Judge, Outcome, Reward, RewardError, Scores, prepare
from nspo_lightning.rewards.rules.labels import harmful_rows, picked_rows
from nspo_lightning.terminal import counted


class SafeAndHelpful(JudgedReward):
    """Safety on harmful prompts, helpfulness on benign ones.

    A reward that only punishes harm is best served by refusing everything. Here a benign prompt's completion earns
    `helpfulness` for being answered and nothing for a refusal, so a policy that refuses all loses that share:

        harmful prompt: unsafe -1, garbage -1, refusal and safe 0
        benign prompt:  unsafe -1, garbage -1, refusal 0, safe `helpfulness` (times the helpful reward, if given)

    Args:
        judge: Names the outcomes.
        helpfulness: What answering a benign prompt is worth, beside the 1 that lies between unsafe and safe.
        helpful_reward: Scores *how* helpful an answer is, best in [0, 1] (a reward model's sigmoid); by default any
            safe answer is as good as another. Called on the answered benign prompts only.
        harmful_column: Column that says which prompts are harmful (see `labels.py`); without it all are.
        name: What TensorBoard and messages call it.
    """

    def __init__(
        self,
        judge: Judge,
        helpfulness: float = 0.5,
        helpful_reward: Reward | None = None,
        harmful_column: str = "kind",
        name: str = "safe_and_helpful",
    ) -> None:
        super().__init__(judge, name)
        if not helpfulness > 0:
            raise ValueError(
                f"`helpfulness` must be positive, got {helpfulness}. Use OutcomeReward for a reward of safety alone."
            )
        self.helpfulness, self.helpful_reward, self.harmful_column = helpfulness, helpful_reward, harmful_column
        self.is_async = self.is_async or (helpful_reward is not None and is_async(helpful_reward))

    def prepare(self) -> None:
        """Prepare the helpful reward; the judge is prepared with the set that this reward is in."""
        prepare(self.helpful_reward)

    def scores(self, outcomes: list[Outcome | None], arguments: Mapping[str, Any]) -> Scores | Awaitable[Scores]:
        """Score outcomes by the kind of their prompts; None where the helpful reward gave None too."""
        harmful = harmful_rows(self.harmful_column, arguments, len(outcomes))
        helped = [i for i, outcome in enumerate(outcomes) if outcome == "safe" and not harmful[i]]
        worth: Any = [1.0] * len(helped)
        if self.helpful_reward and helped:
            chosen = picked_rows(helped, arguments)
            worth = self.helpful_reward(**(chosen if takes_messages(self.helpful_reward) else as_plain_text(chosen)))
        if inspect.isawaitable(worth):
            return self._combined_later(outcomes, helped, worth)
        return self._combined(outcomes, helped, worth)

    async def _combined_later(self, outcomes: list[Outcome | None], helped: list[int], worth: Awaitable[Any]) -> Scores:
        return self._combined(outcomes, helped, await worth)

    def _combined(self, outcomes: list[Outcome | None], helped: list[int], worth: Any) -> Scores:
        if len(worth) != len(helped):
            raise RewardError(
                f"`helpful_reward` must return {counted(len(helped), 'number')}, one a completion, got {len(worth)}.",
                self.name,
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
