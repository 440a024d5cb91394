"""From a batch of prompts to experience: completions, rewards, outcomes, advantages, and the scores to compare with.

Everything here happens without gradient, before a training step learns from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nspo_lightning.grpo import AdvantageScale, group_advantages
from nspo_lightning.module.experience import Experience, ExperienceBuffer
from nspo_lightning.module.judging import JudgedRollout, outcomes_of
from nspo_lightning.module.rollout_metrics import JudgedRows, rollout_metrics
from nspo_lightning.module.rollouts import Rollouts
from nspo_lightning.module.scorer import Scorer
from nspo_lightning.rewards import Judge, RewardSet


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What came of one batch of prompts.

    Attributes:
        buffer: To learn from.
        judged: To show.
        metrics: To log; of all ranks.
        num_tokens: Of all ranks, each completion with its own prompt.
    """

    buffer: ExperienceBuffer
    judged: JudgedRollout
    metrics: dict[str, Tensor | float]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Rolls out, judges and compares.

    Attributes:
        rollouts: Draws the completions.
        reward: Scores them.
        judge: Names them, where the reward does not.
        scorer: Their log-probabilities.
        group_size: G, completions a prompt.
        scale_rewards: What advantages are divided by.
        num_minibatches: Updates that one pass over a rollout is cut into. With several, the policy that sampled is
            scored here, for the steps that see a later one.
        num_iterations: Passes over one rollout.
    """

    rollouts: Rollouts
    reward: RewardSet
    judge: Judge
    scorer: Scorer
    group_size: int
    scale_rewards: AdvantageScale
    num_minibatches: int
    num_iterations: int

    def collect(self, batch: Mapping[str, Any], seed: int, update: int) -> Collected:
        """Turn a batch of P prompts into experience of P * G completions; all ranks call it together.

        Args:
            batch: See `Rollouts.draw`; `prompt` holds the texts or chats, `columns` further ones for the rewards.
            seed: Of the noise, the same on all ranks.
            update: Number of the optimizer's updates so far.

        Returns:
            The experience in a buffer, and what is shown of it.
        """
        group = self.group_size
        drawn = self.rollouts.draw(batch, seed, update)
        prompts = _repeat(batch["prompt"], group)
        columns = {key: _repeat(values, group) for key, values in batch.get("columns", {}).items()}
        result = self.reward(prompts, drawn.texts, columns, completion_ids=drawn.rollout.completion_tokens())
        outcomes = outcomes_of(result, self.judge, prompts, drawn.texts, columns)
        everyone = JudgedRows.of(drawn.rollout, result, outcomes).of_all_ranks()
        advantages = group_advantages(result.total, group, self.scale_rewards, batch_rewards=everyone.rewards.total)
        experience = Experience(
            rollout=drawn.rollout,
            advantages=advantages.to(drawn.rollout.completion_ids.device),
            old_log_probs=self.scorer.log_probs(drawn.rollout) if self.num_minibatches > 1 else None,
            reference_log_probs=self.scorer.reference_log_probs(drawn.rollout),
            sampling_log_probs=drawn.sampling_log_probs,
        )
        judged = JudgedRollout(
            prompts=prompts,
            completions=drawn.texts,
            rewards=result.total.tolist(),
            outcomes=list(outcomes),
            extra=result.extra,
        )
        return Collected(
            buffer=ExperienceBuffer(experience, self.num_minibatches, self.num_iterations),
            judged=judged,
            metrics=rollout_metrics(everyone, group),
            num_tokens=everyone.num_tokens(group),
        )


def _repeat(values: Any, times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]
