"""What text is run through: a module's own forward, or that of the one model in it that can read the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

_CURE = """
    def forward(self, **inputs): return self.model(**inputs)                    # in {0}
    def to_inputs(batch): return {{"input_ids": batch["ids"]}}, batch["mask"]     # arguments, and True = counts
    NullSpaceProjection(..., batch_to_inputs=to_inputs)"""


@runtime_checkable
class ReadsTokens(Protocol):
    """A language model, as transformers makes them."""

    def get_input_embeddings(self) -> nn.Module:
        """Return what tokens become first."""


def plain_forward(pl_module: pl.LightningModule) -> Callable[..., Any]:
    """Return what runs a calibration batch through a module, at all positions.

    Raises:
        MisconfigurationException: If the module has no forward and not just one model; when called, if a batch gives
            other arguments than the forward takes.
    """
    model, module = _model_to_run(pl_module), type(pl_module).__name__
    name = module if model is pl_module else f"The {type(model).__name__} in {module}"

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            given = [type(value).__name__ for value in args] + list(kwargs)
            raise MisconfigurationException(
                f"{name}.forward can't be called with what a calibration batch gives it ({', '.join(given)}): {error}. "
                f"Say with `batch_to_inputs` what it takes:{_CURE.format(module)}"
            ) from error
        return model(*args, **kwargs)

    return run


def _model_to_run(pl_module: pl.LightningModule) -> nn.Module:
    if type(pl_module).forward is not pl.LightningModule.forward:
        return pl_module
    children = {name: child for name, child in pl_module.named_children() if any(True for _ in child.parameters())}
    trained = [child for child in children.values() if any(p.requires_grad for p in child.parameters())]
    # Beside other models, one that reads tokens is a whole one, and not a head on what they give.
    if len(trained) == 1 and (len(children) == 1 or any(isinstance(m, ReadsTokens) for m in trained[0].modules())):
        return trained[0]
    module, names = type(pl_module).__name__, ", ".join(children) or "none"
    raise MisconfigurationException(
        f"{module} has no `forward`, and {len(children)} models in it ({names}), {len(trained)} of them trained: which "
        "of them calibration text goes through can't be told. Give it a `forward`, and where a batch isn't a dict with "
        f"`input_ids`, a tensor or a tuple, say with `batch_to_inputs` what it takes:{_CURE.format(module)}"
    )
