"""Run a model in another mode for a while: without dropout, or without its adapters. Torch only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back to exactly the mix of modes that was found.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def adapted_models(model: nn.Module) -> list[Any]:
    """List the outermost models inside a model whose adapters can be switched off (PEFT's ``disable_adapter``)."""
    found: list[Any] = []
    prefixes: list[str] = []
    for name, module in model.named_modules():
        switch = getattr(module, "disable_adapter", None)
        if callable(switch) and not any(name.startswith(p) for p in prefixes) and hasattr(module, "peft_config"):
            found.append(module)
            prefixes.append(name + "." if name else "")
    return found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base: all adapters inside a model switched off. No parameter changes, nor what requires a gradient.

    Args:
        model: the model; nothing happens to one without adapters.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for adapted in adapted_models(model):
            stack.enter_context(adapted.disable_adapter())
        yield
