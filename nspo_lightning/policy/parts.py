"""A causal language model as two functions: token ids -> hidden states, hidden states -> logits.

Logits can then be computed where they are needed alone. Models that do more between the two than the known soft cap
are found by a trial and used whole: their "hidden states" are then their logits. Nothing here imports transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nspo_lightning.nullspace.modes import evaluation_mode

_TRIAL_TOLERANCE = 1e-3  # relative; the two ways run the same kernels on the same numbers


@runtime_checkable
class _Wrapper(Protocol):
    """A PEFT model."""

    def get_base_model(self) -> nn.Module: ...


@runtime_checkable
class _HasHead(Protocol):
    """A transformers model."""

    def get_output_embeddings(self) -> nn.Module | None: ...


@dataclass(frozen=True, kw_only=True)
class PolicyParts:
    """The two functions and what must be known about them.

    Attributes:
        decode: Called with input_ids and the model's keyword arguments; returns (hidden states (B, T, H), cache).
        head: Maps hidden states (..., H) to logits (..., V).
        model: The causal language model itself, adapters included.
        vocab_size: V.
        head_module: The output layer; None for a model that is used whole.
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


def causal_model(policy: nn.Module) -> Any:
    """Return the transformers model inside a policy: inside a PEFT model, or the policy itself."""
    return policy.get_base_model() if isinstance(policy, _Wrapper) else policy


def text_setting(model: Any, name: str) -> Any:
    """Return an entry of a model's configuration (of its text part); None where models of its kind have none."""
    return getattr(model.config.get_text_config(), name, None)


def policy_parts(policy: nn.Module) -> PolicyParts:
    """Return the parts of a transformers causal language model, bare or inside a PEFT model.

    The adapter's layers stay in place: switching adapters off works as ever.

    Raises:
        TypeError: If the policy has no output embedding.
    """
    model = causal_model(policy)
    head_module: Any = model.get_output_embeddings() if isinstance(model, _HasHead) else None
    if head_module is None:
        raise TypeError(
            f"Expected a causal language model with an output embedding, got {type(model).__name__}. Load the policy "
            "with AutoModelForCausalLM."
        )
    softcap = text_setting(model, "final_logit_softcapping")

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = head_module(hidden)
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    vocab_size = int(head_module.weight.shape[0])
    if _splits(model, head, vocab_size):
        decode = _decoding(model.base_model, "last_hidden_state")
        return PolicyParts(decode=decode, head=head, model=model, vocab_size=vocab_size, head_module=head_module)
    decode = _decoding(model, "logits")
    return PolicyParts(decode=decode, head=lambda x: x, model=model, vocab_size=vocab_size, head_module=None)


def _decoding(module: Any, states: str) -> Callable[..., tuple[Tensor, Any]]:
    def decode(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        output = module(input_ids=input_ids, return_dict=True, **kwargs)
        return output[states], output.get("past_key_values")

    return decode


def _splits(model: Any, head: Callable[[Tensor], Tensor], vocab_size: int) -> bool:
    # Tried once a model: do the decoder's states through the head give the model's own logits?
    if model not in _known:
        _known[model] = model.base_model is not model and _trial(model, head, vocab_size)
        if not _known[model]:
            warnings.warn(
                f"{type(model).__name__} does more than a linear head after its decoder: its logits are taken whole, "
                "which costs memory (rows x length x vocabulary) but changes no number.",
                stacklevel=3,
            )
    return _known[model]


@torch.no_grad()
def _trial(model: Any, head: Callable[[Tensor], Tensor], vocab_size: int) -> bool:
    outputs: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    try:
        with evaluation_mode(model):  # dropout would draw noise that a resumed run draws elsewhere
            # Several different tokens: one of them may be padding, whose embedding and logits can be all zero.
            ids = torch.arange(8, device=next(model.parameters()).device)[None] % vocab_size
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    states = outputs[0].get("last_hidden_state") if len(outputs) == 1 and isinstance(outputs[0], dict) else None
    if states is None:
        return False
    scale = logits.abs().max().clamp(min=1e-6)
    return bool((head(states) - logits).abs().max() <= _TRIAL_TOLERANCE * scale)
