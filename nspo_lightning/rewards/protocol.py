"""What a reward and a judge are, and what else either may offer.

A **reward** is TRL's protocol: a callable, sync or async, that takes keyword arguments `prompts`, `completions`,
perhaps `completion_ids` and the row's other columns, and returns one number or None a sample. None leaves the sample
out of the update; it is not a zero. A **judge** names what a completion is, and rewards are made from that.

Prompts and completions come as plain strings or as chat messages; `messages.py` reads both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Outcome = Literal["unsafe", "refusal", "safe", "garbage", "answered"]
"""What a completion is: harmful help, a declined request, a harmless answer, no answer at all, or an answer of which
nothing else is known, where nobody reads harm (see `RefusalPatterns`)."""

OUTCOMES: tuple[Outcome, ...] = ("unsafe", "refusal", "safe", "garbage")
"""What a judge that reads harm may say."""

Text = str | Sequence[dict[str, Any]]
"""A prompt or completion: a string, or chat messages `[{"role": ..., "content": ...}, ...]`."""

Scores = Sequence[float | None]
"""One number a sample; None excludes the sample."""

RewardFunction = Callable[..., "Scores | Awaitable[Scores]"]
"""What TRL calls a reward function: `reward(prompts, completions, **columns)`, sync or async."""


class RewardError(ValueError):
    """A reward could not be computed. The message names the reward (also in `reward`), what was found and the cure."""

    raised_on_all_ranks = False
    """Set where ranks have agreed on a failure before they raise: collective work (a last checkpoint) is safe then."""

    def __init__(self, message: str, reward: str = "") -> None:
        super().__init__(message)
        self.reward = reward

    def __reduce__(self) -> tuple[type[RewardError], tuple[str, str]]:
        return (type(self), (str(self), self.reward))


class NonFiniteRewardError(RewardError):
    """A reward gave NaN or infinity. It may be an accident of one batch: training skips that update and counts."""


class Reward(ABC):
    """Base of the rewards in this package; a plain function with these arguments is a reward just as well.

    Subclasses are given chats as chats, unless they set `messages` to False.
    """

    messages: bool = True
    """Whether a chat comes as messages; else prompts and completions are text, whatever the data hold."""

    name: str = ""
    """What TensorBoard and messages call it; the class's name if empty."""

    is_async: bool = False
    """Whether calling it gives an awaitable; an `async def __call__` is recognised without."""

    @abstractmethod
    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> Scores | Awaitable[Scores]:
        """Return one number or None (excluded) a sample, or an awaitable of it.

        Prompts, completions and the samples' other `columns` are lists of the same length, in the same order.
        """


class Judge(ABC):
    """Names the outcome of each completion. Any class with `classify` counts as a subclass (a config may name it).

    It is no `typing.Protocol`, since jsonargparse would then ask for the very annotations below.
    """

    @abstractmethod
    def classify(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Outcome | None]:
        """Return one `Outcome` a sample; None only from a judge that was told to exclude what it could not judge.

        Prompts, completions and the samples' other `columns` are lists of the same length, in the same order.
        """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return True if cls is Judge and any("classify" in vars(base) for base in other.__mro__) else NotImplemented


@runtime_checkable
class AsyncJudge(Protocol):
    """A judge that can be awaited, so that several wait for their servers at once."""

    async def aclassify(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[Outcome | None]:
        """Judge one batch without blocking the event loop; see `Judge.classify`."""


@runtime_checkable
class Prepares(Protocol):
    """A reward or judge that loads models or checks settings before long work."""

    def prepare(self) -> None:
        """Load and check, so that what is wrong ends a run before it starts; calling it twice must be harmless."""


@runtime_checkable
class ReportsMetrics(Protocol):
    """A reward or judge that counts what happened to it."""

    def metrics(self) -> Mapping[str, float]:
        """Return counters since the start, by name."""


@runtime_checkable
class SaysIfMessages(Protocol):
    """A reward that says whether it reads chats as messages; any other gets text."""

    messages: bool


@runtime_checkable
class HasJudge(Protocol):
    """A reward that is made from a judge's outcomes."""

    judge: Judge | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Scores with the outcomes that they were made from; an outcome is None where the judge excluded the completion."""

    scores: Scores
    outcomes: list[Outcome | None]


def judge_in(reward: object) -> Judge | None:
    """Find the judge in a reward or a set of rewards: the reward itself if it can judge, else its `judge`."""
    if isinstance(reward, Judge):
        return reward
    return reward.judge if isinstance(reward, HasJudge) and isinstance(reward.judge, Judge) else None


def prepare(thing: object) -> None:
    """Prepare a reward or judge, if it wants to be."""
    if isinstance(thing, Prepares) and callable(thing.prepare):
        thing.prepare()


def metrics_of(thing: object) -> dict[str, float]:
    """Read the counters of a reward or judge, if it keeps any."""
    return dict(thing.metrics()) if isinstance(thing, ReportsMetrics) and callable(thing.metrics) else {}
