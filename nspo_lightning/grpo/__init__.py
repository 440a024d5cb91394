"""GRPO's mathematics: advantages, objective, and micro-batches that add up exactly."""

from nspo_lightning.grpo.accumulate import accumulated_loss
from nspo_lightning.grpo.advantages import AdvantageScale, group_advantages, groups_with_signal
from nspo_lightning.grpo.batch import Rollout
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
    "accumulated_loss",
    "group_advantages",
    "groups_with_signal",
    "loss_mask",
    "objective",
    "split_microbatches",
    "token_weights",
]
