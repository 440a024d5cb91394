"""GRPO's mathematics: advantages, objective, and micro-batches that add up exactly."""

from nspo_lightning.grpo.accumulate import accumulated_loss as accumulated_loss
from nspo_lightning.grpo.advantages import AdvantageScale as AdvantageScale
from nspo_lightning.grpo.advantages import group_advantages as group_advantages
from nspo_lightning.grpo.advantages import rows_with_signal as rows_with_signal
from nspo_lightning.grpo.batch import Rollout as Rollout
from nspo_lightning.grpo.metrics import ObjectiveMetrics as ObjectiveMetrics
from nspo_lightning.grpo.microbatch import MicroBatch as MicroBatch
from nspo_lightning.grpo.microbatch import split_microbatches as split_microbatches
from nspo_lightning.grpo.objective import LossType as LossType
from nspo_lightning.grpo.objective import Normaliser as Normaliser
from nspo_lightning.grpo.objective import Objective as Objective
from nspo_lightning.grpo.objective import ObjectiveConfig as ObjectiveConfig
from nspo_lightning.grpo.objective import RatioLevel as RatioLevel
from nspo_lightning.grpo.objective import loss_mask as loss_mask
from nspo_lightning.grpo.objective import objective as objective
from nspo_lightning.grpo.objective import token_weights as token_weights
