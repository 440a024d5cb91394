"""A policy run over given text as it is: for its logits, or for what enters its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nspo_lightning.policy.parts import causal_model
from nspo_lightning.policy.scoring import positions


def text_logits(policy: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the logits of text.

    Args:
        policy: A causal language model, bare or inside a PEFT model.
        input_ids: Shape (batch, length), padded on either side.
        attention_mask: Of the same shape, 1 = real token; None = all are.

    Returns:
        Shape (batch, length, vocabulary).
    """
    logits: Tensor = policy(**_inputs(input_ids, attention_mask)).logits
    return logits


def run_trained_layers(policy: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Run text through all layers that train, with logits of the last token only where none of them is the head.

    The arguments are those of `text_logits`.
    """
    model = causal_model(policy)
    head = model.get_output_embeddings()
    in_decoder = {id(p) for p in model.base_model.parameters()} - {id(p) for p in head.parameters()}
    decoder_only = all(id(p) in in_decoder for p in policy.parameters() if p.requires_grad)
    few = {"logits_to_keep": 1} if decoder_only else {}
    policy(**_inputs(input_ids, attention_mask), **few)


def _inputs(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """Return what a model is given of text: its places too, which some models would count from the padding on."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    return inputs if attention_mask is None else {**inputs, "position_ids": positions(attention_mask.bool())}
