"""Draw a group of completions for each prompt: prefill, repeat, decode, compact.

Each prompt runs through the policy once. Rows leave the batch as they end, instead of decoding padding. With sharing
off, the same loop runs each row with its own copy of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.policy.sharing import can_share_prompts
from nspo_lightning.rollout.choosing import (
    NonFiniteLogitsError,
    build_processors,
    draw_tokens,
    drawn_log_probs,
    noise,
    nonfinite_logits,
    without_distribution,
    without_padding,
)
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.memory import RowMemory, SharedMemory
from nspo_lightning.rollout.places import Places
from nspo_lightning.rollout.stopping import EndsCompletions


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
    stop: EndsCompletions | None = None,
    generator: torch.Generator | None = None,
    share_prefix: bool = True,
    prompt_places: Places | None = None,
    with_log_probs: bool = False,
) -> Rollout:
    """Sample ``group_size`` completions for each prompt.

    Args:
        model: The policy; runs in evaluation mode, whatever mode it is in.
        prompt_ids: Shape (P, L), left-padded.
        prompt_mask: Shape (P, L), bool, True = real token.
        group_size: G.
        config: Sampling settings.
        eos_token_ids: Every one of them ends a completion; may be empty.
        pad_token_id: Fills completions that are shorter than the longest.
        stop: Sees further ends, such as strings; None = there are none.
        generator: Source of the noise; the same state gives the same completions.
        share_prefix: Run each prompt once. False = the plain path, same results.
        prompt_places: Where these prompts stand in a larger batch, whose noise they get; None = they are all of it.
        with_log_probs: Also keep the log-probabilities of the drawn tokens, see `drawn_log_probs`.

    Returns:
        The rollout, C = length of the longest completion.

    Raises:
        ValueError: If there is no prompt, or one that ends in padding.
        NonFiniteLogitsError: If there are logits that no token can be drawn from.
    """
    prompt_mask = prompt_mask.bool()
    if prompt_ids.shape[0] == 0 or not bool(prompt_mask[:, -1].all()):
        raise ValueError(
            "Expected at least one prompt, each with its last token in the last column (left padding), got "
            f"{int((~prompt_mask[:, -1]).sum())} of {prompt_ids.shape[0]} prompts that end in padding. Tokenize with "
            "padding_side='left'."
        )
    parts = policy_parts(model)
    limit, device, length = config.max_new_tokens, prompt_ids.device, prompt_ids.shape[1]
    total = prompt_ids.shape[0] * group_size
    process = build_processors(config, eos_token_ids=eos_token_ids, prompt_length=length, device=device)
    uniform = _noise_of(prompt_places, limit, prompt_ids.shape[0], group_size, config, generator).to(device)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    # What the processors see: prompts, then what is drawn.
    sequence = torch.full((total, length + limit), pad_token_id, dtype=torch.long, device=device)
    sequence[:, :length] = without_padding(prompt_ids, prompt_mask).repeat_interleave(group_size, 0)
    lengths = torch.full((total,), limit, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    rows = torch.arange(total, device=device)  # the rows that are still running
    log_probs = torch.zeros(total, limit, device=device) if with_log_probs else None

    shared = share_prefix and can_share_prompts(parts.model)
    memory = SharedMemory(parts, group_size) if shared else RowMemory(parts, group_size)
    with evaluation_mode(model):
        logits = memory.prefill(prompt_ids, prompt_mask)
        for step in range(limit):
            raw = logits.float()
            logits = process(sequence, rows, length + step, raw)
            broken = without_distribution(raw)
            if logits is not raw:
                broken |= without_distribution(logits)
            token = draw_tokens(logits, uniform[step, rows], greedy=config.temperature == 0)
            sequence[rows, length + step] = token
            if log_probs is not None:
                log_probs[rows, step] = drawn_log_probs(raw, token, config.temperature)
            ended = torch.isin(token, eos)
            if stop is not None:
                ended |= stop(sequence[rows, length : length + step + 1])
            some_broken, some_ended = torch.stack([broken.any(), ended.any()]).tolist()  # one synchronisation
            if some_broken:
                raise NonFiniteLogitsError(nonfinite_logits(step, int(broken.sum()), len(rows)))
            if some_ended:
                finished[rows[ended]] = True
                lengths[rows[ended]] = step + 1
                running = (~ended).nonzero().squeeze(1)
                rows, token = rows[running], token[running]
                if len(rows):
                    memory.keep(running)
            if len(rows) == 0 or step + 1 == limit:
                break
            logits = memory.step(token)
    longest = int(lengths.max())
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        group_size=group_size,
        completion_ids=sequence[:, length : length + longest].clone(),
        completion_mask=torch.arange(longest, device=device) < lengths[:, None],
        finished=finished,
        log_probs=None if log_probs is None else log_probs[:, :longest].clone(),
    )


def _noise_of(
    prompt_places: Places | None,
    steps: int,
    prompts: int,
    group_size: int,
    config: SamplingConfig,
    generator: torch.Generator | None,
) -> Tensor:
    # (steps, prompts * group_size). One number a token is so little that every rank draws everybody's.
    if prompt_places is None:
        return noise(steps, prompts * group_size, config, generator)
    drawn = noise(steps, prompt_places.total * group_size, config, generator)
    mine = torch.tensor(prompt_places.mine, device=drawn.device)
    return drawn.view(steps, prompt_places.total, group_size)[:, mine].flatten(1)
