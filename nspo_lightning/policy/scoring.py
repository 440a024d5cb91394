"""Log-probabilities of completions: prompts once, completions behind them, logits only where tokens are scored.

A plain pass costs G * (L + C) tokens a group; this one costs L + (sum of real completion lengths), with the same
results: keys and values of the prompt do not depend on the completion. Prompts are part of the graph, so the
gradients of all completions flow back through one prompt pass and add up there. See `batch` for the notation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nspo_lightning.grpo.batch import Rollout, TokenCounts
from nspo_lightning.policy.attention import GroupPass
from nspo_lightning.policy.log_probs import TokenScores, chosen_log_probs
from nspo_lightning.policy.parts import PolicyParts, policy_parts
from nspo_lightning.policy.ragged import Ragged
from nspo_lightning.policy.sharing import can_share_prompts, group_attention


def score_completions(
    model: nn.Module,
    rollout: Rollout,
    *,
    temperature: float = 1.0,
    share_prefix: bool = True,
    with_entropy: bool = False,
    counts: TokenCounts | None = None,
) -> TokenScores:
    """Return scores of the sampled tokens under the model as it is now, of shape (P * G, C), zero at padding.

    With dropout in the adapter, one prompt has one dropout mask for its whole group.

    Args:
        model: The policy; with gradients if grad mode is on, the reference if its adapter is switched off.
        rollout: What to score; every completion has at least one token.
        temperature: Divides the logits, as in sampling.
        share_prefix: Run each prompt once. False = each row in full, the plain path.
        with_entropy: Also compute entropies (without gradient).
        counts: Of the rollout's tokens, where known (`MicroBatch.counts`): nothing then waits for the device.

    Raises:
        ValueError: If a completion has no token.
    """
    mask = rollout.completion_mask
    if counts is None:
        counts = TokenCounts.of(rollout.prompt_mask, mask)
    if counts.empty:
        raise ValueError(
            f"{counts.empty} of {len(mask)} completions have no token, so there is nothing to score. A sampled "
            "completion has at least one, its EOS: check `completion_mask`."
        )
    parts = policy_parts(model)
    shared = share_prefix and can_share_prompts(parts.model)
    tokens = Ragged(mask, counts.completions)
    hidden = _shared_states(parts, rollout, counts) if shared else _plain_states(parts, rollout, tokens)
    scores = chosen_log_probs(
        hidden,
        tokens.pack(rollout.completion_ids),
        parts.head,
        vocab_size=parts.vocab_size,
        head_is_frozen=parts.head_is_frozen,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return TokenScores(
        log_probs=tokens.pad(scores.log_probs), entropy=None if scores.entropy is None else tokens.pad(scores.entropy)
    )


def positions(mask: Tensor) -> Tensor:
    """Count real tokens (True, shape (B, T)) from the left, from 0; padding holds some valid position."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


def _shared_states(parts: PolicyParts, rollout: Rollout, counts: TokenCounts) -> Tensor:
    # The states that predict each real completion token, in row order: (N, H).
    prompt_mask, mask = rollout.prompt_mask, rollout.completion_mask
    prompts = Ragged(prompt_mask, counts.prompts)
    # Token t is an input where token t + 1 exists: the last one of each row predicts nothing.
    inputs = Ragged(mask[:, 1:], counts.completions - len(mask))
    ids = torch.cat([prompts.pack(rollout.prompt_ids), inputs.pack(rollout.completion_ids[:, :-1])])
    offset = prompt_mask.sum(1).repeat_interleave(rollout.group_size)[:, None]
    behind = offset + torch.arange(mask.shape[1] - 1, device=mask.device)
    position = torch.cat([prompts.pack(positions(prompt_mask)), inputs.pack(behind)])
    group_pass = GroupPass(prompts, inputs if inputs.size else None)
    with group_attention(parts.model):
        states, _ = parts.decode(ids[None], position_ids=position[None], use_cache=False, group_pass=group_pass)
    # Row r's states: its prompt's last one, then those of its inputs, which lie in row order behind all prompts. Its
    # n tokens have n - 1 inputs, so token i of the flat list of targets is predicted by input i - r - 1.
    lengths = mask.sum(1)
    row = torch.arange(len(mask), device=mask.device)
    of_row = row.repeat_interleave(lengths, output_size=counts.completions)
    source = torch.arange(counts.completions, device=mask.device) - of_row - 1 + counts.prompts
    ends = prompt_mask.sum(1).cumsum(0) - 1
    source[lengths.cumsum(0) - lengths] = ends.repeat_interleave(rollout.group_size)
    return states[0].index_select(0, source)


def _plain_states(parts: PolicyParts, rollout: Rollout, tokens: Ragged) -> Tensor:
    # The same states from one full sequence a row.
    ids, mask = (part[:, :-1] for part in rollout.whole_rows())
    states, _ = parts.decode(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return tokens.pack(states[:, rollout.prompt_ids.shape[1] - 1 :])
