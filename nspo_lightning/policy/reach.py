"""Which parts of a model text never reaches: a vision tower beside the language model, what stands between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from nspo_lightning.nullspace.modes import evaluation_mode


@torch.no_grad()
def beyond_text(model: Any) -> list[str]:
    """Return the outermost modules with weights, outside of the language model, that a forward over text does not run.

    A model of text alone has none, and is not run.

    Args:
        model: A causal language model of transformers, without an adapter.
    """
    parts = (model.get_decoder(), model.get_output_embeddings())
    text = {id(module) for part in parts if part is not None for module in part.modules()}
    outside = {name: module for name, module in model.named_modules() if id(module) not in text}
    around = {name for name, module in outside.items() if any(id(inner) in text for inner in module.modules())}
    beside = {name: module for name, module in outside.items() if name not in around and [*module.parameters()]}
    if not beside:
        return []
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in beside.items()
    ]
    try:
        with evaluation_mode(model):
            embedding = model.get_input_embeddings().weight
            model(input_ids=torch.arange(8, device=embedding.device)[None] % embedding.shape[0], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in beside if not any(c == name or c.startswith(name + ".") for c in called)]
    return [name for name in silent if not any(name.startswith(outer + ".") for outer in silent)]


def inside(names: Sequence[str]) -> str:
    """Return a regular expression for the names of modules and of all that is inside them."""
    return "|".join(rf"{re.escape(name)}(\..*)?" for name in names)
