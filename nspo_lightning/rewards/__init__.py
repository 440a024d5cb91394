"""Rewards and judges: text in, numbers out. Heavy clients and models are imported when one is built."""

from __future__ import annotations

from nspo_lightning.evaluation.thoughts import answer_of
from nspo_lightning.rewards.compose import RewardResult, RewardSet
from nspo_lightning.rewards.function import FunctionReward
from nspo_lightning.rewards.judges.classifier import ClassifierJudge, ClassifierReward
from nspo_lightning.rewards.judges.guard import GuardJudge
from nspo_lightning.rewards.judges.server_judge import ServerJudge
from nspo_lightning.rewards.outcomes import OutcomeReward
from nspo_lightning.rewards.protocol import (
    OUTCOMES,
    Judge,
    NonFiniteRewardError,
    Outcome,
    Reward,
    RewardError,
    RewardFunction,
    Text,
    judge_in,
)
from nspo_lightning.rewards.rules.helpful import SafeAndHelpful
from nspo_lightning.rewards.rules.refusal import RefusalReward, RulesJudge
from nspo_lightning.rewards.rules.safety_and_answers import SafetyAndAnswers
from nspo_lightning.rewards.rules.shape import FormatReward, LengthReward

__all__ = [
    "OUTCOMES",
    "ClassifierJudge",
    "ClassifierReward",
    "FormatReward",
    "FunctionReward",
    "GuardJudge",
    "Judge",
    "LengthReward",
    "NonFiniteRewardError",
    "Outcome",
    "OutcomeReward",
    "RefusalReward",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RewardResult",
    "RewardSet",
    "RulesJudge",
    "SafeAndHelpful",
    "SafetyAndAnswers",
    "ServerJudge",
    "Text",
    "answer_of",
    "judge_in",
]
