"""Completions while they are written: the sequences, the noise, and how one more token is drawn for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.rollout.choosing import (
    Process,
    build_processors,
    draw_tokens,
    drawn_log_probs,
    is_any_of,
    without_distribution,
    without_padding,
)
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.stopping import EndsCompletions


@dataclass(frozen=True, kw_only=True)
class Draft:
    """R rows of a prompt of padded length L and at most C tokens behind it.

    Attributes:
        config: How tokens are drawn.
        sequence: Shape (R, L + C): prompts, then what is drawn; a column not drawn yet repeats the prompt's last token.
        prompt_length: L.
        uniform: Shape (C, R), float64, the noise.
        eos: Shape (E,), tokens that end a completion.
        stop: Sees further ends; None = there are none.
        process: From logits to logits.
        log_probs: Shape (R, C), float32, of what is drawn; None where they are not asked for.
        ended_at: Shape (R,), int64, the place of each row's last token, counted from 0; C = not ended. Decoding writes
            it.
    """

    config: SamplingConfig
    sequence: Tensor
    prompt_length: int
    uniform: Tensor
    eos: Tensor
    stop: EndsCompletions | None
    process: Process
    log_probs: Tensor | None
    ended_at: Tensor

    @classmethod
    def begin(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        group_size: int,
        config: SamplingConfig,
        eos_token_ids: Sequence[int],
        uniform: Tensor,
        stop: EndsCompletions | None = None,
        with_log_probs: bool = False,
    ) -> Draft:
        """Begin G completions for each of the prompts (P, L), left-padded; `uniform` has shape (C, P * G)."""
        device, length = prompt_ids.device, prompt_ids.shape[1]
        undrawn = prompt_ids[:, -1:].expand(-1, config.max_new_tokens)
        sequence = torch.cat([without_padding(prompt_ids, prompt_mask), undrawn], 1)
        sequence = sequence.repeat_interleave(group_size, 0)
        return cls(
            config=config,
            sequence=sequence,
            prompt_length=length,
            uniform=uniform.to(device),
            eos=torch.tensor(list(eos_token_ids), dtype=torch.long, device=device),
            stop=stop,
            process=build_processors(config, eos_token_ids=eos_token_ids, prompt_length=length, device=device),
            log_probs=torch.zeros(len(sequence), config.max_new_tokens, device=device) if with_log_probs else None,
            ended_at=torch.full((len(sequence),), config.max_new_tokens, device=device),
        )

    def write(self, rows: Tensor, drawn: int | Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one token for each of some rows and write it behind what they have.

        Args:
            rows: Shape (r,).
            drawn: Tokens these rows have so far; an int, or a tensor of shape (1,), and then no shape depends on it.
            logits: Shape (r, V).

        Returns:
            Each of shape (r,): the token; whether it is an EOS; whether no token could be drawn, and this one means
            nothing.
        """
        raw = logits.float()
        processed = self.process(self.sequence, rows, drawn, raw)
        broken = without_distribution(raw)
        if processed is not raw:
            broken |= without_distribution(processed)
        token = draw_tokens(processed, self.uniform[drawn, rows], greedy=self.config.temperature == 0)
        self.sequence[rows, self.prompt_length + drawn] = token
        if self.log_probs is not None:
            self.log_probs[rows, drawn] = drawn_log_probs(raw, token, self.config.temperature)
        return token, is_any_of(token, self.eos), broken

    def stops(self, rows: Tensor, drawn: int) -> Tensor | None:
        """Return which of some rows, (r,), end by `stop` at the last of their first `drawn` tokens; None: none can."""
        if self.stop is None or drawn <= self.config.min_new_tokens:  # as servers do, which look at none before
            return None
        return self.stop(self.sequence[rows, self.prompt_length : self.prompt_length + drawn])

    def rollout(self, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int, pad_token_id: int) -> Rollout:
        """Return what was drawn up to each row's end."""
        ids = self.sequence[:, self.prompt_length :]
        lengths = (self.ended_at + 1).clamp(max=ids.shape[1])
        longest = int(lengths.max())
        mask = torch.arange(longest, device=ids.device) < lengths[:, None]
        return Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            group_size=group_size,
            completion_ids=ids[:, :longest].masked_fill(~mask, pad_token_id),
            completion_mask=mask,
            finished=self.ended_at < ids.shape[1],
            log_probs=None if self.log_probs is None else self.log_probs[:, :longest].masked_fill(~mask, 0.0),
        )
