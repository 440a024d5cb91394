"""Guided exploration: a part of each group is answered under a safety prompt that training does not see.

A policy that never refuses has no refusal to learn from. Under a system prompt that asks for it, it may refuse; those
answers stand in their group as answers to the plain prompt. They were drawn by another distribution, so each of their
tokens is weighted by the truncated importance ratio min(p(token | plain) / p(token | guided), cap), as what a server
drew is. A token that the plain policy would hardly ever write has a small ratio, and little is learnt from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from nspo_lightning.grpo import Rollout
from nspo_lightning.module.prefixes import with_prefix_ids
from nspo_lightning.module.text_policy import PREFIX_IDS, TextPolicy
from nspo_lightning.policy.chats import folds_system, with_system
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.rollout.places import Places

SAFETY_PROMPT = (
    "You are a careful assistant. If a request asks for something harmful, illegal or unethical, do not comply: begin "
    'your answer with "I can\'t help with that." Answer all other requests as usual.'
)


@dataclass(frozen=True)
class GuidedSampling:
    """Which part of a group is guided, and how.

    Attributes:
        share: Of each group, between 0 and 1; rounded to at least one completion and at most all but one.
        system_prompt: Put before the prompt as a system message: before the text of its own one where it has one, and
            before the first user message where the chat template has no system role.
    """

    share: float = 0.25
    system_prompt: str = SAFETY_PROMPT

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.share < 1:
            raise ValueError(
                f"`guided.share` must lie between 0 and 1, got {self.share}: it is the share of each group that is "
                "sampled under the safety prompt. For none of it set `guided: null`."
            )
        if not self.system_prompt.strip():
            raise ValueError("`guided.system_prompt` is empty. Say what the guided part of a group shall do.")

    def completions(self, group_size: int) -> int:
        """Return how many of a group's completions are guided."""
        return min(max(round(self.share * group_size), 1), group_size - 1)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Prompts that are answered in one go.

    Attributes:
        batch: `prompt_ids` (P, L), left-padded, and `prompt_mask`.
        group_size: Completions a prompt in this part.
        places: Where they stand in the batch of all ranks.
    """

    batch: Mapping[str, Any]
    group_size: int
    places: Places


@dataclass
class Guidance:
    """Splits groups into a plain and a guided part, and puts them together again.

    Attributes:
        policy: Renders prompts.
        settings: None = all of a group is plain.
    """

    policy: TextPolicy
    settings: GuidedSampling | None

    def parts(self, batch: Mapping[str, Any], group_size: int, places: Places) -> list[Part]:
        """Return what is to be drawn for a batch: the plain part, and the guided one if there is one."""
        if self.settings is None:
            return [Part(batch=batch, group_size=group_size, places=places)]
        guided = self.settings.completions(group_size)
        plain = group_size - guided
        rendered = self.policy.render([self._guided(prompt) for prompt in batch["prompt"]])
        if PREFIX_IDS in batch:  # begun answers go on behind the safety prompt too
            rendered = with_prefix_ids(rendered, batch[PREFIX_IDS], int(self.policy.tokenizer.pad_token_id))
        return [
            Part(batch=batch, group_size=plain, places=replace(places, group_size=group_size)),
            Part(batch=rendered, group_size=guided, places=replace(places, group_size=group_size, first=plain)),
        ]

    def extra_tokens(self) -> int:
        """Return how many tokens a guided prompt is longer than the plain one, at most.

        Templates put a system message of their own before a prompt that has none: the safety prompt then takes the
        place of that one, but stands before a prompt's own.

        Returns:
            Tokens; 0 without a guided part.

        Raises:
            PolicyError: If the chat template leaves the system prompt out.
        """
        if self.settings is None:
            return 0
        prompts: list[Any] = ["x"]
        if not self._folds:
            prompts.append([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}])
        return max(0, *(self._tokens(self._guided(prompt)) - self._tokens(prompt) for prompt in prompts))

    def _tokens(self, prompt: Any) -> int:
        return int(self.policy.render([prompt])["prompt_ids"].shape[1])

    def _guided(self, prompt: Any) -> list[dict[str, Any]]:
        assert self.settings is not None
        return with_system(prompt, self.settings.system_prompt, fold=self._folds)

    @cached_property
    def _folds(self) -> bool:
        """Whether the system prompt goes into the user's turn, as the chat template has no system role."""
        text = "" if self.settings is None else self.settings.system_prompt
        folds = folds_system(
            lambda chat: str(
                self.policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ),
            text,
        )
        if folds:
            rank_zero_info("The chat template has no system role: `guided.system_prompt` begins the user's turn.")
        if folds is not None:
            return folds
        raise PolicyError(
            "The chat template leaves `guided.system_prompt` out, as a system message and in the user's turn, so the "
            "guided part of a group would not be guided. Give another `policy.chat_template`, or set `guided: null`."
        )


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Put the plain and the guided part of groups together; a plain part alone is returned as it is.

    Args:
        parts: P groups of g1 plain completions, and of g2 guided ones, with log-probabilities.

    Returns:
        P groups of g1 + g2 with the plain prompts, the guided ones last; `guided` says which.
    """
    if len(parts) == 1:
        return parts[0]
    plain, guided = parts
    longest = max(part.completion_ids.shape[1] for part in parts)

    def rows(values: Sequence[Tensor]) -> Tensor:
        if values[0].ndim == 2:
            values = [F.pad(value, (0, longest - value.shape[1])) for value in values]
        groups = [value.view(plain.num_prompts, -1, *value.shape[1:]) for value in values]
        return torch.cat(groups, dim=1).flatten(0, 1)

    assert plain.log_probs is not None
    assert guided.log_probs is not None
    return replace(
        plain,
        group_size=plain.group_size + guided.group_size,
        completion_ids=rows([part.completion_ids for part in parts]),
        completion_mask=rows([part.completion_mask for part in parts]),
        finished=rows([part.finished for part in parts]),
        log_probs=rows([plain.log_probs, guided.log_probs]),
        guided=rows([torch.full_like(part.finished, part is guided) for part in parts]),
    )
