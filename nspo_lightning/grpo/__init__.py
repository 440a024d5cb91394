"""GRPO's mathematics: advantages, objective, log-probabilities, and micro-batches that add up exactly."""

from nspo_lightning.grpo.accumulate import accumulated_loss
from nspo_lightning.grpo.advantages import AdvantageScale, group_advantages, groups_with_signal
from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.grpo.log_probs import TokenScores
from nspo_lightning.grpo.metrics import ObjectiveMetrics
from nspo_lightning.grpo.microbatch import MicroBatch, split_microbatches
from nspo_lightning.grpo.objective import (
    LossType,
    Normaliser,
    Objective,
    ObjectiveConfig,
    RatioLevel,
    loss_mask,
    objective,
    token_weights,
)
from nspo_lightning.grpo.scoring import score_completions
from nspo_lightning.grpo.sharing import can_share_prompts

__all__ = [
    "AdvantageScale",
    "LossType",
    "MicroBatch",
    "Normaliser",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveMetrics",
    "RatioLevel",
    "Rollout",
    "TokenScores",
    "accumulated_loss",
    "can_share_prompts",
    "group_advantages",
    "groups_with_signal",
    "loss_mask",
    "objective",
    "score_completions",
    "split_microbatches",
    "token_weights",
]
