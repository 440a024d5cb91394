"""Rewards and judges: text in, numbers out. Heavy clients and models are imported when one is built."""

from __future__ import annotations

from nspo_lightning.rewards.base import OUTCOMES, Judge, Outcome, Reward, RewardError, RewardFunction, Text
from nspo_lightning.rewards.compose import RewardResult, RewardSet
from nspo_lightning.rewards.function import FunctionReward

__all__ = [
    "OUTCOMES",
    "FunctionReward",
    "Judge",
    "Outcome",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RewardResult",
    "RewardSet",
    "Text",
]
