"""Perplexity of a policy on given text and its KL divergence from its base, the same model with the adapter off.

Logits exist for a chunk of positions at a time; between the two passes only hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning.nullspace.modes import adapters_off, evaluation_mode
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.divergence import TextSums, predicted_positions, text_sums
from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.policy.scoring import positions


@torch.no_grad()
def score_text(policy: nn.Module, batch: Mapping[str, Any]) -> TextSums:
    """Return sums over the scored tokens of a batch of text; `kl` is NaN without an adapter.

    Args:
        policy: A PEFT model, or a plain causal language model; run in eval mode, and left in the mode it was in.
        batch: `input_ids` and `attention_mask` (1 = real token) of shape (B, T), padded on either side; `labels_mask`
            (1 = score this token) of the same shape, or every real token but the first is scored.
    """
    device = next(policy.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    labels = batch.get("labels_mask")
    scored = predicted_positions(mask, None if labels is None else labels.to(device))
    parts = policy_parts(policy)

    def states() -> Tensor:
        hidden, _ = parts.decode(ids, attention_mask=mask, position_ids=positions(mask.bool()), use_cache=False)
        return hidden[:, :-1][scored]

    def base_head(hidden: Tensor) -> Tensor:
        with adapters_off(policy):  # an adapter on the output head is the exception, and must be off as well
            return parts.head(hidden)

    with evaluation_mode(policy):
        policy_states, base_states = states(), None
        if has_adapter(policy):
            with adapters_off(policy):
                base_states = states()
        return text_sums(
            policy_states,
            ids[:, 1:][scored],
            parts.head,
            base_states,
            parts.head if parts.head_is_frozen else base_head,
            vocab_size=parts.vocab_size,
        )


def score_texts(policy: nn.Module, batches: Iterable[Mapping[str, Any]]) -> TextSums:
    """Score this rank's share of batches (see `score_text`) and return the sums over all tokens of all ranks."""
    none = 0.0 if has_adapter(policy) else float("nan")
    total = TextSums(kl=none, base_nll=none)
    for batch in batches:
        total += score_text(policy, batch)
    return total.over_ranks(next(policy.parameters()).device)
