"""Draw a group of completions for each prompt: prefill, repeat, decode, compact.

The prompt runs through the policy once and its cache is repeated for the group. Rows leave the batch as they end.
With sharing off, the same code runs each row with its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.grpo.parts import policy_parts
from nspo_lightning.grpo.prefix import can_share_prefix, evaluation_mode, positions
from nspo_lightning.rollout.choosing import build_processors, draw, without_padding
from nspo_lightning.rollout.config import SamplingConfig


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    group_size: int,
    config: SamplingConfig,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
    share_prefix: bool = True,
) -> Rollout:
    """Sample ``group_size`` completions for each prompt.

    Args:
        model: the policy; runs in evaluation mode, whatever mode it is in.
        prompt_ids: shape (P, L), left-padded.
        prompt_mask: shape (P, L), bool, True = real token.
        group_size: G.
        config: sampling settings.
        eos_token_ids: every one of them ends a completion; may be empty.
        pad_token_id: fills completions that are shorter than the longest.
        generator: source of the noise; the same state gives the same completions.
        share_prefix: run each prompt once a group. False = the plain path, same results.

    Returns:
        The rollout, C = length of the longest completion.

    Raises:
        ValueError: If the prompts are not left-padded or one of them is empty.
    """
    prompt_mask = prompt_mask.bool()
    if prompt_ids.shape[0] == 0 or not bool(prompt_mask[:, -1].all()):
        raise ValueError(
            "Expected at least one prompt, each with its last token in the last column (left padding), got "
            f"{int((~prompt_mask[:, -1]).sum())} of {prompt_ids.shape[0]} prompts that end in padding. Use "
            "padding_side='left'."
        )
    parts = policy_parts(model)
    shared = share_prefix and group_size > 1 and can_share_prefix(parts.model)
    device = prompt_ids.device
    rows_total, limit = prompt_ids.shape[0] * group_size, config.max_new_tokens
    row_prompts, row_mask = prompt_ids.repeat_interleave(group_size, 0), prompt_mask.repeat_interleave(group_size, 0)
    processors = build_processors(config, eos_token_ids=eos_token_ids, prompt_length=prompt_ids.shape[1], device=device)
    uniform = None
    if config.temperature > 0:
        noise_device = generator.device if generator is not None else "cpu"
        uniform = torch.rand(limit, rows_total, dtype=torch.float64, generator=generator, device=noise_device).to(
            device
        )
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)

    length = prompt_ids.shape[1]
    sequence = torch.full((rows_total, length + limit), pad_token_id, dtype=torch.long, device=device)
    sequence[:, :length] = without_padding(row_prompts, row_mask)
    seen = torch.cat([row_mask, torch.ones(rows_total, limit, dtype=torch.bool, device=device)], 1)
    next_position = row_mask.sum(1)
    lengths = torch.full((rows_total,), limit, device=device)
    finished = torch.zeros(rows_total, dtype=torch.bool, device=device)
    rows = torch.arange(rows_total, device=device)

    with evaluation_mode(model):
        ids, mask = (prompt_ids, prompt_mask) if shared else (row_prompts, row_mask)
        hidden, cache = parts.decode(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
        logits = parts.head(hidden[:, -1])
        if shared:
            logits = logits.repeat_interleave(group_size, 0)
            cache.batch_repeat_interleave(group_size)
        for step in range(limit):
            logits = logits.float()
            for process in processors:
                logits = process(sequence[rows, : length + step], logits)
            token = draw(logits, None if uniform is None else uniform[step, rows])
            sequence[rows, length + step] = token
            ended = torch.isin(token, eos) if len(eos) else torch.zeros_like(token, dtype=torch.bool)
            if bool(ended.any()):
                finished[rows[ended]] = True
                lengths[rows[ended]] = step + 1
                alive = (~ended).nonzero().squeeze(1)
                rows, token = rows[alive], token[alive]
                if len(rows):
                    cache.batch_select_indices(alive)
            if step + 1 == limit or not len(rows):
                break
            hidden, cache = parts.decode(
                token[:, None],
                attention_mask=seen[rows, : length + step + 1],
                position_ids=(next_position[rows] + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = parts.head(hidden[:, -1])
    longest = int(lengths.max())
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        group_size=group_size,
        completion_ids=sequence[:, length : length + longest].clone(),
        completion_mask=torch.arange(longest, device=device) < lengths[:, None],
        finished=finished,
    )
