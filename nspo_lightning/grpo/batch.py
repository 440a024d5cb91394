"""The rollout: prompts, their groups of completions, and what it costs to push them through the policy.

Notation: P prompts of padded length L, G completions a prompt (a *group*), R = P * G rows of padded length C. Row
``p * G + g`` is completion g of prompt p. Masks are True at real tokens. Prompts are left-padded, so that all of them
end in the same column; completions are right-padded, so that all of them start in the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nspo_lightning.grpo.records import map_tensors


class TokenCounts(NamedTuple):
    """What must be known of masks to lay out their tokens, as plain numbers: asking a device for them waits for it."""

    prompts: int
    """Real tokens of all prompts."""
    completions: int
    """Real tokens of all completions."""
    empty: int
    """Completions without a token."""

    @classmethod
    def of(cls, prompt_mask: Tensor, completion_mask: Tensor) -> TokenCounts:
        """Count masks of shape (P, L) and (R, C); waits for the device where they are on one."""
        empty = (~completion_mask.any(1)).sum()
        return cls(*torch.stack([prompt_mask.sum(), completion_mask.sum(), empty]).tolist())


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Groups of completions and the prompts that they answer.

    Attributes:
        prompt_ids: Shape (P, L), left-padded.
        prompt_mask: Shape (P, L), bool, True = real token.
        group_size: G, completions a prompt.
        completion_ids: Shape (P * G, C), right-padded.
        completion_mask: Shape (P * G, C), bool, True = generated token, the one that ends it included.
        finished: Shape (P * G,), bool, True = came to its end (EOS or another token that ends a turn, a stop token or
            string), False = cut by the length limit.
        log_probs: Shape (P * G, C), float32, of the tokens under the weights that drew them, zero at padding; None
            where they were not asked for.
        guided: Shape (P * G,), bool, True = drawn under another prompt than the one that stands here (then there are
            log-probabilities); None = none was.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    group_size: int
    completion_ids: Tensor
    completion_mask: Tensor
    finished: Tensor
    log_probs: Tensor | None = None
    guided: Tensor | None = None

    def __post_init__(self) -> None:
        """Check once that prompts, rows and group size fit together; else raise ValueError."""
        prompts, rows = self.prompt_ids.shape[0], self.completion_ids.shape[0]
        if self.prompt_ids.shape != self.prompt_mask.shape or self.completion_ids.shape != self.completion_mask.shape:
            raise ValueError(
                f"ids and masks must have the same shape, got prompts {tuple(self.prompt_ids.shape)} with mask "
                f"{tuple(self.prompt_mask.shape)} and completions {tuple(self.completion_ids.shape)} with mask "
                f"{tuple(self.completion_mask.shape)}."
            )
        if rows != prompts * self.group_size or self.finished.shape != (rows,):
            raise ValueError(
                f"{prompts} prompts with group_size={self.group_size} need {prompts * self.group_size} completion rows "
                f"and as many `finished` flags, got {rows} rows and {tuple(self.finished.shape)} flags."
            )

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts."""
        return self.prompt_ids.shape[0]

    def to(self, device: torch.device | str) -> Rollout:
        """Return the same rollout on a device."""
        return map_tensors(self, lambda tensor: tensor.to(device))

    def select(self, prompts: slice | Sequence[int] | Tensor) -> Rollout:
        """Keep whole groups: a slice, a list of indices, or an index or bool tensor of shape (P,)."""
        index = torch.arange(self.num_prompts, device=self.prompt_ids.device)
        index = index[prompts if isinstance(prompts, slice) else torch.as_tensor(prompts, device=index.device)]
        offsets = torch.arange(self.group_size, device=index.device)
        return self._take(index, (index[:, None] * self.group_size + offsets).flatten(), self.group_size)

    def select_rows(self, prompt: int, rows: Tensor) -> Rollout:
        """Keep one prompt and some of its completions: `rows` has shape (g,), indices in [0, P * G)."""
        return self._take(torch.tensor([prompt], device=self.prompt_ids.device), rows, len(rows))

    def trim(self, prompt_mask: Tensor | None = None, completion_mask: Tensor | None = None) -> Rollout:
        """Return it without columns that are padding in every row; at least one column of each kind stays.

        Given copies of its masks on the CPU, nothing waits for the device.
        """
        prompt_columns = (self.prompt_mask if prompt_mask is None else prompt_mask).any(0).nonzero()
        completion_columns = (self.completion_mask if completion_mask is None else completion_mask).any(0).nonzero()
        start = int(prompt_columns[0]) if len(prompt_columns) else self.prompt_ids.shape[1] - 1
        stop = int(completion_columns[-1]) + 1 if len(completion_columns) else 1
        return replace(
            self,
            prompt_ids=self.prompt_ids[:, start:],
            prompt_mask=self.prompt_mask[:, start:],
            completion_ids=self.completion_ids[:, :stop],
            completion_mask=self.completion_mask[:, :stop],
            log_probs=None if self.log_probs is None else self.log_probs[:, :stop],
        )

    @classmethod
    def concat(cls, parts: Sequence[Rollout]) -> Rollout:
        """Put groups of several rollouts together, at least one, all of one group size; padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        before = max(part.prompt_ids.shape[1] for part in parts)
        behind = max(part.completion_ids.shape[1] for part in parts)

        def prompts(name: str) -> Tensor:
            values = [vars(part)[name] for part in parts]
            return torch.cat([F.pad(value, (before - value.shape[1], 0)) for value in values])

        def completions(name: str) -> Tensor:
            values = [vars(part)[name] for part in parts]
            return torch.cat([F.pad(value, (0, behind - value.shape[1])) for value in values])

        return cls(
            prompt_ids=prompts("prompt_ids"),
            prompt_mask=prompts("prompt_mask"),
            group_size=parts[0].group_size,
            completion_ids=completions("completion_ids"),
            completion_mask=completions("completion_mask"),
            finished=torch.cat([part.finished for part in parts]),
            log_probs=None if parts[0].log_probs is None else completions("log_probs"),
            guided=None if parts[0].guided is None else torch.cat([vars(part)["guided"] for part in parts]),
        )

    def completion_tokens(self) -> list[list[int]]:
        """List the generated tokens of each completion, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.completion_ids, self.completion_mask, strict=True)]

    def whole_rows(self) -> tuple[Tensor, Tensor]:
        """Return each prompt with its completion behind it: ids and mask (True = real token), shape (R, L + C)."""
        prompt_ids, prompt_mask = (
            prompts.repeat_interleave(self.group_size, 0) for prompts in (self.prompt_ids, self.prompt_mask)
        )
        return torch.cat([prompt_ids, self.completion_ids], 1), torch.cat([prompt_mask, self.completion_mask], 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the fields that are there, for checkpoints; `Rollout(**state)` makes it again."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def _take(self, prompts: Tensor, rows: Tensor, group_size: int) -> Rollout:
        return Rollout(
            prompt_ids=self.prompt_ids[prompts],
            prompt_mask=self.prompt_mask[prompts],
            group_size=group_size,
            completion_ids=self.completion_ids[rows],
            completion_mask=self.completion_mask[rows],
            finished=self.finished[rows],
            log_probs=None if self.log_probs is None else self.log_probs[rows],
            guided=None if self.guided is None else self.guided[rows],
        )
