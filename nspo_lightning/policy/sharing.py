"""Making a transformers model attend in groups, for as long as a ``with`` block, or find out that it can't.

Transformers looks its attention function up by name, at each call. Inside `group_attention` the name is ours; the
pass itself (`GroupPass`, or the sampler's) travels as a keyword argument through the model's layers. Gradient
checkpointing runs layers again during the backward pass, after the block has ended: the checkpoint function is
wrapped too, so that the name is ours again whenever a layer is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nspo_lightning.compat.transformers import attention_named, checkpoint_wrapped
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.attention import GroupPass
from nspo_lightning.policy.parts import text_setting

_NAME = "nspo_group"
_TRIAL_TOLERANCE = 2e-2  # relative to the largest logit; loose enough for 16-bit weights, a wrong mask is off by more
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Windowed models whose attention is known to hand its window to the attention function.
_WINDOWED = {"gemma2", "gemma3", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3"}
_known: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group_pass: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    # Transformers' layout: query (1, H, T, d), key and value (1, K, T, d); returns (1, T, H, d) and no weights.
    out = group_pass.attend(
        module.layer_idx,
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        scale=scaling,
        dropout=dropout,
        softcap=softcap,
        window=sliding_window,
    )
    return out[None], None


@contextmanager
def group_attention(model: nn.Module) -> Iterator[None]:
    """Let a causal model attend in groups inside the block; it is called with ``group_pass=`` and tokens (1, T)."""
    from transformers import AttentionInterface  # heavy: imported where it is used

    AttentionInterface.register(_NAME, _attention_function)
    config: Any = model.config

    def wrap(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def renamed(*inner: Any, **inner_kwargs: Any) -> Any:
                with attention_named(config, _NAME):
                    return function(*inner, **inner_kwargs)

            return checkpoint(renamed, *args, **kwargs)

        return run

    with checkpoint_wrapped(model, wrap), attention_named(config, _NAME):
        yield


def can_share_prompts(model: nn.Module) -> bool:
    """Return whether the causal language model can attend in groups; warn once a model where it can't.

    Tried, not guessed: a prompt with two completions must give the logits of two full passes.
    """
    if model not in _known:
        _known[model] = _why_not(model)
        if _known[model]:
            warnings.warn(
                f"{type(model).__name__} cannot share a prompt among its completions ({_known[model]}): each is run "
                "with its own copy, slower and with the same results.",
                stacklevel=3,
            )
    return not _known[model]


@torch.no_grad()
def _why_not(model: Any) -> str:
    # Returns the reason against sharing, or an empty string.
    windowed = [name for name in _WINDOWS if text_setting(model, name) is not None]
    kind = text_setting(model, "model_type")
    if windowed and kind not in _WINDOWED:
        return f"it sets {windowed[0]}, and how a {kind} model applies it is not known here"
    device = next(model.parameters()).device
    vocabulary = int(text_setting(model, "vocab_size"))
    prompt = torch.arange(3, device=device) % vocabulary
    tails = torch.arange(3, 7, device=device).view(2, 2) % vocabulary
    ones = torch.ones(1, 3, dtype=torch.bool, device=device)
    asked: dict[int, tuple[Tensor, Tensor]] = {}
    with evaluation_mode(model):
        rows = torch.cat([prompt.expand(2, 3), tails], 1)
        full = model(input_ids=rows, use_cache=False, return_dict=True).logits
        try:
            with group_attention(model):
                flat = model(
                    input_ids=torch.cat([prompt, tails.flatten()])[None],
                    position_ids=torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=device),
                    use_cache=False,
                    return_dict=True,
                    group_pass=GroupPass(ones, torch.ones_like(tails, dtype=torch.bool), asked),
                ).logits[0]
        except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            return f"trying it failed with {type(error).__name__}: {error}"
    if not asked:  # what it did instead can look right where attention hardly matters
        return "its attention is not one that can be chosen by name"
    expected = torch.cat([full[0, :3], full[:, 3:].flatten(0, 1)])
    if bool((flat - expected).abs().max() > _TRIAL_TOLERANCE * expected.abs().max().clamp(min=1e-6)):
        return "a trial gave other logits than full passes do"
    return ""
