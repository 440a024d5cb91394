"""From a batch of prompts to experience: completions, rewards, outcomes, advantages, and the scores to compare with.

Everything here happens without gradient, before a training step learns from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nspo_lightning.grpo import group_advantages
from nspo_lightning.module.ahead import Ahead
from nspo_lightning.module.experience import Experience, ExperienceBuffer
from nspo_lightning.module.judging import JudgedRollout, name_outcomes
from nspo_lightning.module.rollout_metrics import JudgedRows, rollout_metrics
from nspo_lightning.module.rollouts import Rollouts
from nspo_lightning.module.scorer import Scorer
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.rewards import Judge, RewardSet
from nspo_lightning.rewards.trainer_state import TrainerState


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What came of one batch of prompts.

    Attributes:
        buffer: To learn from.
        judged: To show.
        rows: Of all ranks.
        metrics: To log; of all ranks.
        num_tokens: Of all ranks, each completion with its own prompt.
    """

    buffer: ExperienceBuffer
    judged: JudgedRollout
    rows: JudgedRows
    metrics: dict[str, Tensor | float]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Rolls out, judges and compares.

    Attributes:
        settings: Of the training.
        rollouts: Draws completions.
        reward: Scores them.
        judge: Names them.
        reward_names_outcomes: Whether the outcomes that a reward was made from stand, and the judge is not asked again.
        scorer: Computes log-probabilities.
    """

    settings: TrainingSettings
    rollouts: Rollouts
    reward: RewardSet
    judge: Judge
    reward_names_outcomes: bool
    scorer: Scorer

    def collect(
        self, batch: Mapping[str, Any], seed: int, update: int, state: TrainerState, ahead: Ahead | None = None
    ) -> Collected:
        """Return experience of P * G completions to a batch of P prompts, with the rewards' other `columns`.

        `seed`, `update` and `ahead` are for `Rollouts.draw`, `state` says to rewards where training is.
        """
        settings, group = self.settings, self.settings.group_size
        drawn = self.rollouts.draw(batch, seed, update, ahead)
        prompts = _repeat(batch["prompt"], group)
        columns = {key: _repeat(values, group) for key, values in batch.get("columns", {}).items()}
        ids = drawn.rollout.completion_tokens()
        result = self.reward(prompts, drawn.texts, columns, completion_ids=ids, trainer_state=state)
        own = result if self.reward_names_outcomes else None
        outcomes = name_outcomes(own, self.judge, prompts, drawn.texts, columns)
        everyone = JudgedRows.of(drawn.rollout, result, outcomes).of_all_ranks()
        advantages = group_advantages(result.total, group, settings.scale_rewards, batch_rewards=everyone.rewards.total)
        experience = Experience(
            rollout=drawn.rollout,
            advantages=advantages.to(drawn.rollout.completion_ids.device),
            old_log_probs=self.scorer.log_probs(drawn.rollout) if settings.num_minibatches > 1 else None,
            reference_log_probs=self.scorer.reference_log_probs(drawn.rollout),
        )
        server = settings.rollout_server
        staleness = {"rollout/staleness": float(update - drawn.update)} if server and server.overlap else {}
        return Collected(
            buffer=ExperienceBuffer(experience, settings.num_minibatches, settings.num_iterations),
            judged=JudgedRollout(prompts=prompts, completions=drawn.texts, result=result, outcomes=outcomes),
            rows=everyone,
            metrics={**rollout_metrics(everyone, group), **staleness},
            num_tokens=everyone.num_tokens(group),
        )


def _repeat(values: Any, times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]
