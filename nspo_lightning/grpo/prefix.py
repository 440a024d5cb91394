"""Whether a model can run a prompt once for a whole group, and the positions of tokens behind left padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PROBE_TOLERANCE = 1e-2  # relative, loose enough for 16-bit weights: a broken cache is off by order one
_known: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def positions(mask: Tensor) -> Tensor:
    """Count real tokens from the left.

    Args:
        mask: shape (B, T), bool, True = real token.

    Returns:
        Shape (B, T), int64: 0 for the first real token; padding holds some valid position.
    """
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back to exactly the mix of modes that was found.

    Args:
        model: the policy.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def can_share_prefix(model: nn.Module) -> bool:
    """Tell whether one pass over a prompt can serve a group; warn once a model where it can't.

    Tried, not guessed: two tokens go through the model once, their cache is repeated, and a third token's logits must
    be those of a full pass.

    Args:
        model: the causal language model.

    Returns:
        True if the model's cache can be repeated.
    """
    if model not in _known:
        _known[model] = _why_not(model)
        if _known[model]:
            warnings.warn(
                f"{type(model).__name__} cannot share a prompt among its group's completions ({_known[model]}): each "
                "completion is run with its own prompt, slower and with the same results.",
                stacklevel=3,
            )
    return not _known[model]


@torch.no_grad()
def _why_not(model: Any) -> str:
    """Return the reason against sharing, or an empty string."""
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1, 2]], device=device)
    with evaluation_mode(model):
        full = model(input_ids=ids, use_cache=False, return_dict=True).logits[:, -1]
        output = model(input_ids=ids[:, :2], use_cache=True, return_dict=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return "it returns no cache"
        if not hasattr(cache, "batch_repeat_interleave") or not hasattr(cache, "batch_select_indices"):
            return f"its cache, a {type(cache).__name__}, has no way to repeat and select rows"
        try:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([1], device=device))
            again = model(
                input_ids=ids[:, 2:],
                attention_mask=torch.ones_like(ids),
                position_ids=torch.tensor([[2]], device=device),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            ).logits[:, -1]
        except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            return f"its cache, a {type(cache).__name__}, fails: {error}"
    if bool((again - full).abs().max() > _PROBE_TOLERANCE * full.abs().max().clamp(min=1e-6)):
        return f"its cache, a {type(cache).__name__}, gives other results when repeated"
    return ""
