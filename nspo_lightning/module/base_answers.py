"""What the base answers to general prompts, for calibration text that goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nspo_lightning.evaluation.thoughts import is_unfinished
from nspo_lightning.module.evaluator import EVALUATION_SEED
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.texts import written_texts


@dataclass(frozen=True, kw_only=True)
class BaseAnswers:
    """Answers as the base, the policy with its adapter off, and keeps what it said.

    What is calibrated on is the same before training, after a warm start, and where a run goes on; and a null space and
    a penalty beside it read the same text.

    Attributes:
        policy: Answers.
        sampling: How.
        tell_of_thoughts: Told how many answers are a thought without an end, and of how many; see `Evaluator`.
        known: Prompts and length limit -> their answers.
    """

    policy: TextPolicy
    sampling: SamplingConfig
    tell_of_thoughts: Callable[[float, int], None]
    known: dict[tuple[tuple[str, ...], int], list[str]] = field(default_factory=dict)

    def to(self, prompts: Sequence[Any], max_new_tokens: int | None = None) -> list[str]:
        """Return what is written behind rendered texts or chats, thoughts too.

        Args:
            prompts: As `TextPolicy.render` takes them.
            max_new_tokens: Of an answer, at most; None = as `sampling` says.

        Returns:
            The answers, one a prompt.
        """
        batch, sampling = self.policy.render(prompts), self.sampling
        if max_new_tokens is not None:
            most = min(max_new_tokens, sampling.max_new_tokens)
            sampling = replace(sampling, max_new_tokens=most, min_new_tokens=min(most, sampling.min_new_tokens))
        key = (tuple(map(str, prompts)), sampling.max_new_tokens)
        if (known := self.known.get(key)) is not None:
            return known
        with adapters_off(self.policy.require()):
            rollout, texts = self.policy.generate(batch, sampling, 1, EVALUATION_SEED, exact=True)
        self.tell_of_thoughts(sum(map(is_unfinished, texts)), len(texts))
        answers = written_texts(self.policy.tokenizer, rollout, sampling)
        if has_adapter(self.policy.require()):  # full weights move: there the base is gone
            self.known[key] = answers
        return answers
