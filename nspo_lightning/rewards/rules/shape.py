"""Rewards for a completion's shape: its length and its format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from nspo_lightning.rewards.messages import as_text
from nspo_lightning.rewards.protocol import Reward, RewardError, Scores, Text


class LengthReward(Reward):
    """0 for a length within bounds, falling linearly to -1 outside of them.

    Args:
        minimum: Shortest length without a penalty.
        maximum: Longest length without a penalty; no bound by default.
        slope: How far outside (in `unit`) the penalty reaches -1.
        unit: What is counted; `tokens` needs the completions' token ids.
    """

    name = "length"

    def __init__(
        self,
        minimum: int = 0,
        maximum: int | None = None,
        slope: int = 100,
        unit: Literal["characters", "words", "tokens"] = "words",
    ) -> None:
        if minimum < 0 or (maximum is not None and maximum < minimum):
            raise ValueError(f"Lengths must satisfy 0 <= `minimum` <= `maximum`, got {minimum} and {maximum}.")
        if slope < 1:
            raise ValueError(f"`slope` must be at least 1, got {slope}.")
        if unit not in ("characters", "words", "tokens"):
            raise ValueError(f"`unit` must be characters, words or tokens, got {unit!r}.")
        self.minimum, self.maximum, self.slope, self.unit = minimum, maximum, slope, unit

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Scores:
        """Give a number in [-1, 0] for each completion; `completion_ids` is read if `unit` is tokens."""
        if self.unit == "tokens":
            if "completion_ids" not in columns:
                raise RewardError(
                    "LengthReward counts tokens, but the batch has no `completion_ids`. Count `words` or `characters`.",
                    self.name,
                )
            lengths = [len(ids) for ids in columns["completion_ids"]]
        else:
            texts = [as_text(text) for text in completions]
            lengths = [len(text) if self.unit == "characters" else len(text.split()) for text in texts]
        return [self._score(length) for length in lengths]

    def _score(self, length: int) -> float:
        over = 0 if self.maximum is None else length - self.maximum
        outside = max(self.minimum - length, over, 0)
        return -min(1.0, outside / self.slope)


class FormatReward(Reward):
    """1 for a completion that matches a regular expression, else 0.

    Args:
        pattern: The expression; `.` matches line breaks too.
        whole: Whether the whole completion must match, or any part of it.
    """

    name = "format"

    def __init__(self, pattern: str, whole: bool = True) -> None:
        try:
            self._compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"`pattern` must be a regular expression, got {pattern!r}: {error}.") from error
        self.whole = whole

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Scores:
        """Give 1.0 or 0.0 for each completion."""
        match = self._compiled.fullmatch if self.whole else self._compiled.search
        return [float(match(as_text(text).strip()) is not None) for text in completions]
