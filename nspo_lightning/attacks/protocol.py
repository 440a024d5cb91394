"""What an attack is: rows go in, rows come out, with an optional beginning of the answer; and how answers are drawn.

An attack changes what a prompt says (a template), how its answer begins (prefill), or how answers are drawn (decoding).
It knows rows and text. Attacks that search against a policy are given it as a `Victim`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nspo_lightning.rewards.protocol import Outcome, Text
from nspo_lightning.rollout.config import SamplingConfig

ATTACK, LOOKALIKES = "attack", "lookalikes"
"""In a batch: the attack, and whether its prompts are look-alikes instead of harmful ones."""


class AttackError(ValueError):
    """An attack that there is none of, or that can't be made: what was expected, what was found, what cures it."""

    raised_on_all_ranks = True
    """All ranks read the same settings."""


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One row, before or after an attack.

    Attributes:
        prompt: Text (one user turn), or a chat that ends with a user turn.
        harmful: Whether a good policy refuses it; if not, it is a look-alike, on which over-refusal is measured.
        prefix_tokens: The answer begins with that many tokens of one that complies: the row's target, or an answer of
            the base (of a look-alike: its reference answer, or the base's).
        prefix_text: The answer begins with this text instead.
    """

    prompt: Text
    harmful: bool
    prefix_tokens: int = 0
    prefix_text: str = ""


@runtime_checkable
class Victim(Protocol):
    """A policy that is attacked, for attacks that search against it."""

    def attack_model(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""

    def attack_answers(self, prompts: Sequence[Text]) -> list[str]:
        """Answer prompts, one answer each."""

    def attack_outcomes(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[Outcome | None]:
        """Name answers, as the judge of the run does."""


class Attack(ABC):
    """One attack; a subclass of your own may be named by its class path wherever names of attacks stand."""

    name: str = ""
    """What tables call it."""

    tries: int = 1
    """Answers a prompt; the attack has succeeded if any of them complies."""

    on_lookalikes: bool = True
    """Whether look-alikes are attacked alike, which measures over-refusal under this attack."""

    searches: bool = False
    """Whether it searches against the policy, so that it can't be training data."""

    limit: int | None = None
    """Prompts that it is tried on at most; None = as many as others."""

    def check(self) -> None:
        """See, before any work, that what it needs is there; AttackError if it is not."""
        return

    @abstractmethod
    def attacked(self, rows: Sequence[AttackRow], victim: Victim | None) -> list[AttackRow]:
        """Return a row for each row, in the same order.

        `victim` is the policy that is measured, for attacks that search; None where there is none at hand.
        """

    def sampling(self, plain: SamplingConfig) -> SamplingConfig:
        """Return how answers are drawn, given how they are drawn without an attack."""
        return plain

    def is_same_as(self, other: Attack) -> bool:
        """Whether another attack does the same under the same name, wherever it was read from."""
        return type(self) is type(other) and _settings(self) == _settings(other)

    @property
    def changes_prompts(self) -> bool:
        """Whether all that it does is done to the prompt, without a policy: then it can be training data."""
        return False


def _settings(attack: Attack) -> dict[str, Any]:
    return {name: value for name, value in vars(attack).items() if not name.startswith("_") and name != "source"}
