"""Log-probabilities of completions: the prompt once a group, the completions against its cache.

A plain forward pass costs G * (L + C) tokens a group; this one costs L + G * C, with the same results: keys and values
of the prompt do not depend on the completion. The cache is part of the graph, so gradients of all completions flow
back into the one prompt pass and add up there. See the `batch` module for the notation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.grpo.log_probs import TokenScores, chosen_log_probs
from nspo_lightning.grpo.parts import PolicyParts, policy_parts
from nspo_lightning.grpo.prefix import can_share_prefix, positions


def score_completions(
    model: nn.Module,
    rollout: Rollout,
    *,
    temperature: float = 1.0,
    share_prefix: bool = True,
    with_entropy: bool = False,
    logits_chunk_tokens: int | None = None,
) -> TokenScores:
    """Score the sampled tokens of all completions under the model as it is now.

    Args:
        model: the policy; with gradients if grad mode is on, the reference if its adapter is switched off.
        rollout: what to score.
        temperature: divides the logits, as in sampling.
        share_prefix: run each prompt once a group. False = run each row in full, the plain path.
        with_entropy: also compute entropies (without gradient).
        logits_chunk_tokens: positions whose logits may exist at once; None = by memory.

    Returns:
        Scores of shape (P * G, C), zero at padding.
    """
    parts = policy_parts(model)
    mask = rollout.completion_mask
    group = rollout.group_size if share_prefix and rollout.group_size > 1 and can_share_prefix(parts.model) else 1
    hidden = _completion_states(parts, rollout, group)
    scores = chosen_log_probs(
        hidden[mask],
        rollout.completion_ids[mask],
        parts.head,
        vocab_size=parts.vocab_size,
        head_is_frozen=parts.head_is_frozen,
        temperature=temperature,
        with_entropy=with_entropy,
        chunk_tokens=logits_chunk_tokens,
    )

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return TokenScores(
        log_probs=spread(scores.log_probs), entropy=None if scores.entropy is None else spread(scores.entropy)
    )


def _completion_states(parts: PolicyParts, rollout: Rollout, group: int) -> Tensor:
    # Returns the states that predict each completion token, (P * G, C, H); `group` rows share a prompt, 1 = none do.
    prompt_ids, prompt_mask = rollout.prompt_ids, rollout.prompt_mask
    if group == 1:
        prompt_ids = prompt_ids.repeat_interleave(rollout.group_size, 0)
        prompt_mask = prompt_mask.repeat_interleave(rollout.group_size, 0)
        full_mask = torch.cat([prompt_mask, rollout.completion_mask[:, :-1]], 1)
        ids = torch.cat([prompt_ids, rollout.completion_ids[:, :-1]], 1)
        states, _ = parts.decode(ids, attention_mask=full_mask, position_ids=positions(full_mask), use_cache=False)
        return states[:, prompt_ids.shape[1] - 1 :]
    first, cache = parts.decode(
        prompt_ids, attention_mask=prompt_mask, position_ids=positions(prompt_mask), use_cache=True
    )
    first = first[:, -1:].repeat_interleave(group, 0)
    if rollout.completion_ids.shape[1] == 1:
        return first
    cache.batch_repeat_interleave(group)
    prompt_mask = prompt_mask.repeat_interleave(group, 0)
    full_mask = torch.cat([prompt_mask, rollout.completion_mask[:, :-1]], 1)
    rest, _ = parts.decode(
        rollout.completion_ids[:, :-1],
        attention_mask=full_mask,
        position_ids=positions(full_mask)[:, prompt_mask.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first, rest], 1)
