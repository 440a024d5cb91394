"""A causal language model as two functions: token ids -> hidden states, hidden states -> logits.

Only so can logits be computed where they are needed. Models that do more between the two than the known soft cap are
found by a probe and used whole: their "hidden states" are then their logits. Nothing here imports transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nspo_lightning.nullspace.modes import evaluation_mode

_PROBE_TOLERANCE = 1e-3  # relative; the two ways run the same kernels on the same numbers


@dataclass(frozen=True, kw_only=True)
class PolicyParts:
    """The two functions and what must be known about them.

    Attributes:
        decode: called with input_ids and the model's keyword arguments; returns (hidden states (B, T, H), cache).
        head: maps hidden states (..., H) to logits (..., V).
        model: the causal language model itself, adapters included.
        vocab_size: V.
    """

    decode: Callable[..., tuple[Tensor, Any]]
    head: Callable[[Tensor], Tensor]
    model: nn.Module
    vocab_size: int
    head_module: nn.Module | None

    @property
    def head_is_frozen(self) -> bool:
        """Whether no parameter of the head needs a gradient."""
        return self.head_module is None or not any(p.requires_grad for p in self.head_module.parameters())


_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def policy_parts(policy: nn.Module) -> PolicyParts:
    """Take a policy apart.

    Args:
        policy: a transformers causal language model, bare or inside a PEFT model.

    Returns:
        Its parts. The adapter's layers stay in place: switching adapters off works as ever.

    Raises:
        TypeError: If the policy has no output embedding.
    """
    wrapped: Any = policy
    model: Any = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    head_module: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head_module is None:
        raise TypeError(
            f"Expected a causal language model with an output embedding, got {type(model).__name__}. Load the policy "
            "with AutoModelForCausalLM."
        )
    weight: Tensor = head_module.weight
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    softcap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = head_module(hidden)
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    vocab_size = int(weight.shape[0])
    if _splits(model, head, vocab_size):
        return PolicyParts(
            decode=_decoder(model), head=head, model=model, vocab_size=vocab_size, head_module=head_module
        )
    return PolicyParts(
        decode=_whole(model), head=lambda logits: logits, model=model, vocab_size=vocab_size, head_module=None
    )


def _decoder(model: Any) -> Callable[..., tuple[Tensor, Any]]:
    inner = model.base_model

    def decode(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        output = inner(input_ids=input_ids, return_dict=True, **kwargs)
        return output.last_hidden_state, getattr(output, "past_key_values", None)

    return decode


def _whole(model: Any) -> Callable[..., tuple[Tensor, Any]]:
    def decode(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=input_ids, return_dict=True, **kwargs)
        return output.logits, getattr(output, "past_key_values", None)

    return decode


def _splits(model: Any, head: Callable[[Tensor], Tensor], vocab_size: int) -> bool:
    # Tried once a model: do the decoder's states through the head give the model's own logits?
    if model in _known:
        return _known[model]
    seen: list[Any] = []
    inner = getattr(model, "base_model", model)
    matches = False
    if inner is not model:
        handle = inner.register_forward_hook(
            lambda _m, _a, output: seen.append(getattr(output, "last_hidden_state", None))
        )
        try:
            with torch.no_grad(), evaluation_mode(model):  # dropout would draw noise that a resumed run draws elsewhere
                # Several different tokens: one of them may be padding, whose embedding and logits can be all zero.
                ids = torch.arange(8, device=next(model.parameters()).device)[None] % vocab_size
                logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
                if len(seen) == 1 and isinstance(seen[0], Tensor):
                    scale = logits.abs().max().clamp(min=1e-6)
                    matches = bool((head(seen[0]) - logits).abs().max() <= _PROBE_TOLERANCE * scale)
        finally:
            handle.remove()
    if not matches:
        warnings.warn(
            f"{type(model).__name__} does more than a linear head after its decoder: its logits are taken whole, which "
            "costs memory (rows x length x vocabulary) but changes no number.",
            stacklevel=3,
        )
    _known[model] = matches
    return matches
