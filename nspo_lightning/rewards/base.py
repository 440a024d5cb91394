"""What a reward and a judge are: the protocols that everything else in this package fits.

A **reward** is TRL's protocol: a callable, sync or async, that takes keyword arguments `prompts`, `completions`,
perhaps `completion_ids` and the row's other columns, and returns one number or None a sample. None leaves the sample
out of the update; it is not a zero. A **judge** names what a completion is, and rewards are made from that.

Prompts and completions come as plain strings or as chat messages; `messages.py` reads both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

__all__ = ["OUTCOMES", "Judge", "Outcome", "RewardError", "RewardFunction", "Scores", "Text"]

Outcome = Literal["unsafe", "refusal", "safe", "garbage"]
"""What a completion is: harmful help, a declined request, a harmless answer, or no answer at all."""

OUTCOMES: tuple[Outcome, ...] = ("unsafe", "refusal", "safe", "garbage")

Text = str | Sequence[dict[str, Any]]
"""A prompt or completion: a string, or chat messages `[{"role": ..., "content": ...}, ...]`."""

Scores = Sequence[float | None]
"""One number a sample; None excludes the sample."""


class RewardError(ValueError):
    """A reward could not be computed. The message names the reward, what was found and the cure.

    Attributes:
        reward: name of the reward that failed.
    """

    def __init__(self, message: str, reward: str = "") -> None:
        super().__init__(message)
        self.reward = reward

    def __reduce__(self) -> tuple[type[RewardError], tuple[str, str]]:
        return (type(self), (str(self), self.reward))


@runtime_checkable
class RewardFunction(Protocol):
    """TRL's reward protocol: a number or None for each of the samples, in their order."""

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> Scores | Awaitable[Scores]:
        """Score one batch.

        Args:
            prompts: one prompt a sample.
            completions: one completion a sample, in the same order.
            **columns: the samples' other columns, lists of the same length.

        Returns:
            One number or None (excluded) a sample, or an awaitable of it.
        """
        ...


@runtime_checkable
class Judge(Protocol):
    """Names the outcome of each completion."""

    def classify(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Outcome | None]:
        """Judge one batch.

        Args:
            prompts: one prompt a sample.
            completions: one completion a sample, in the same order.
            **columns: the samples' other columns, lists of the same length.

        Returns:
            One `Outcome` a sample. None only from a judge that was told to exclude what it could not judge.
        """
        ...
