"""Weights that several layers of a model share: most often the output head is the embedding."""

from __future__ import annotations

from typing import Any

from torch import nn

from nspo_lightning.nullspace.shapes import Adapter, base_of


def untie_(model: Any, module: nn.Module) -> list[str]:
    """Give a layer a weight of its own where it shares one, so that adding an update to it moves no other layer.

    The configuration then says that the head is not the embedding, so that what is saved is loaded as it was.

    Args:
        model: The transformers model, bare or with adapters on its layers.
        module: One of its layers.

    Returns:
        The modules that it shared its weight with; empty where it shared none.
    """
    weight = _own_weight(module)
    others = [
        name
        for name, other in model.named_modules()
        if weight is not None and other is not module and _own_weight(other) is weight
    ]
    if weight is not None and others:
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return others


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


def untie_adapted_(model: Any) -> None:
    """Give each layer that carries an adapter a weight of its own, before adapters are merged."""
    for module in list(model.modules()):
        if Adapter.of(module) is not None:
            untie_(model, base_of(module))
