"""Rollouts: groups of completions drawn from the policy."""

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.sampler import sample

__all__ = ["Rollout", "SamplingConfig", "sample"]
