"""The policy as attacks see it: what they may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nspo_lightning.module.judging import ask_judge
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.rewards import Judge, Outcome, Text
from nspo_lightning.rollout import SamplingConfig

_SEED = 20_231_012


@dataclass(frozen=True, kw_only=True)
class PolicyVictim:
    """A policy under attack; see `datamodules.attacked.AttackedPolicy`.

    Attributes:
        policy: Answers.
        judge: Names the answers.
        sampling: How harmful prompts are answered.
        over_refusal_skills: Skills of look-alikes.
        start: Puts the weights that training goes on from in place, if that was not done yet: a search may be the first
            to ask for the policy.
    """

    policy: TextPolicy
    judge: Judge
    sampling: SamplingConfig
    over_refusal_skills: Sequence[str]
    start: Callable[[], None]

    @property
    def prompt_room(self) -> int | None:
        """Tokens that a prompt with the beginning of its answer may have; None = no limit is known."""
        limit = self.policy.context_tokens
        return None if limit is None else limit - self.sampling.max_new_tokens

    def attack_model(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        self.start()
        return self.policy.require(), self.policy.tokenizer

    def attack_answers(self, prompts: Sequence[Text]) -> list[str]:
        """Answer prompts, one answer each."""
        self.start()
        return self.policy.generate(self.policy.render(prompts), self.sampling, 1, _SEED, exact=True)[1]

    def attack_outcomes(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[Outcome | None]:
        """Name answers, as the judge of the run does."""
        return ask_judge(self.judge, prompts, completions, {})
