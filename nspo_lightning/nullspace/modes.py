"""Run a model in another mode for a while: without dropout, or without its adapters. Torch only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back to exactly the mix of modes that was found."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@runtime_checkable
class Adapted(Protocol):
    """A model whose adapters can be switched off for a while; PEFT's models are."""

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Run the base in this context."""


def adapted_models(model: nn.Module) -> list[Adapted]:
    """List the outermost models inside a model whose adapters can be switched off."""
    found: list[Adapted] = []
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Adapted) and not any(name.startswith(p) for p in prefixes):
            found.append(module)
            prefixes.append(name + "." if name else "")
    return found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base: all adapters inside a model switched off, if there are any.

    No parameter changes, nor what requires a gradient.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with ExitStack() as stack:
            for adapted in adapted_models(model):
                stack.enter_context(adapted.disable_adapter())
            yield
    finally:
        for parameter in frozen:  # PEFT sets all of an adapter to train when it is switched on again
            parameter.requires_grad_(False)
