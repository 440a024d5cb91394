"""What has no public name in transformers (written against 5.x): the attention's name and layers that run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CHECKPOINT = "_gradient_checkpointing_func"


@contextmanager
def attention_named(config: Any, name: str) -> Iterator[None]:
    """Let a model, given by its configuration, look its attention up under another registered name inside the block."""
    # The public `set_attn_implementation` can set the name, but nothing public tells the one to go back to.
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def checkpoint_wrapped(model: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Wrap the function by which layers under gradient checkpointing run themselves, inside the block."""
    # `wrap` maps a function such as `torch.utils.checkpoint.checkpoint` to what is called instead.
    originals: list[tuple[Any, Callable[..., Any]]] = [
        (module, vars(module)[_CHECKPOINT])
        for module in model.modules()
        if vars(module).get("gradient_checkpointing") and _CHECKPOINT in vars(module)
    ]
    for module, original in originals:
        module._gradient_checkpointing_func = wrap(original)
    try:
        yield
    finally:
        for module, original in originals:
            module._gradient_checkpointing_func = original


def gguf_architectures() -> list[str]:
    """Return the architectures that transformers reads from GGUF files, sorted."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:  # a second reader, since 5.2x
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        GGUF_ARCHS = {}
    return sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS} - {"general", "tokenizer"})


def without_gguf_(model: Any) -> None:
    """Make a model that was loaded from a GGUF, its weights unpacked, a plain one that can be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
