"""Gradients of general text, taken beside those of a training step: what methods need that hold a policy by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from nspo_lightning import ranks
from nspo_lightning.callbacks.protocols import BoundsMicrobatches, LearnsFromText
from nspo_lightning.policy.divergence import TextLoss


def trained_by(optimizer: Optimizer | LightningOptimizer) -> list[nn.Parameter]:
    """List the parameters that an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def check_takes_text(module: pl.LightningModule, name: str) -> LearnsFromText:
    """Return the module as one that learns from text; all of its trained parameters are whole on each rank.

    Raises:
        MisconfigurationException: If it isn't, or they are not.
    """
    if not isinstance(module, LearnsFromText):
        raise MisconfigurationException(
            f"{name} takes gradients of general text, and {type(module).__name__} has no `text_loss`. Use `GRPOModule`."
        )
    if any(ranks.local_part(p) is not p for p in module.parameters()):
        raise MisconfigurationException(
            f"{name} does not work with sharded weights (FSDP2): use one process, or the strategy 'ddp'."
        )
    return module


def mean_gradients(
    module: LearnsFromText, batches: Iterable[Any], kind: TextLoss, parameters: Sequence[nn.Parameter], device: Any
) -> tuple[list[Tensor], float]:
    """Return the gradient of the mean over tokens, one batch's graph at a time, and that mean; the same on all ranks.

    A batch of more tokens than the module's `tokens_per_microbatch` is taken in parts.

    Args:
        module: Takes text.
        batches: The same on all ranks, which share them out.
        kind: See `text_loss`.
        parameters: What the gradient is with respect to; zero where the text does not reach one.
        device: Where the module is.

    Returns:
        One tensor a parameter, and the mean.

    Raises:
        ValueError: If something in it is not finite.
    """
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    counts = torch.zeros(2, device=device)
    limit = module.tokens_per_microbatch if isinstance(module, BoundsMicrobatches) else None
    for number, batch in enumerate(part for whole in batches for part in microbatches(whole, limit)):
        if number % ranks.world_size() != ranks.rank():
            continue
        moved = move_data_to_device(batch, device)
        with torch.enable_grad():
            loss, tokens = module.text_loss(moved, kind)
            if not tokens:  # a text of one token, or an answer that ends before it begins
                continue
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient
        counts += torch.stack([loss.detach(), torch.tensor(float(tokens), device=device)])
    if ranks.world_size() > 1:
        sums, counts = [ranks.all_reduce_sum(total) for total in sums], ranks.all_reduce_sum(counts)
    value, tokens_of_all = counts.tolist()
    if not torch.isfinite(torch.stack([total.abs().max() for total in sums] + [counts.max()])).all():
        raise ValueError(
            f"The {kind.upper()} on general text ({value / max(tokens_of_all, 1):.3g} nats a token) or its gradient is "
            "not finite. Lower the learning rate (or the coefficient), or look for tokens that the base rules out."
        )
    return [total / max(tokens_of_all, 1.0) for total in sums], value / max(tokens_of_all, 1.0)


@torch.no_grad()
def add_pull_(parameter: nn.Parameter, gradient: Tensor, weight: float) -> None:
    """Add `weight` times a gradient to a parameter's own; the gradient is used up."""
    pull = gradient.mul_(weight).to(parameter.dtype)
    parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)


def microbatches(batch: Mapping[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """Return a batch in parts of at most `limit` tokens, padding included; a row that is longer is a part alone.

    Example:
        >>> [part["input_ids"].tolist() for part in microbatches({"input_ids": torch.tensor([[1, 2], [3, 4]])}, 3)]
        [[[1, 2]], [[3, 4]]]
    """
    rows, width = batch["input_ids"].shape
    size = rows if limit is None else max(1, min(rows, limit // max(width, 1)))
    return [rows_of(batch, range(start, min(start + size, rows))) for start in range(0, rows, size)]


def rows_of(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return some rows of a batch: of its tensors and lists; what is one for all rows, such as a name, stays.

    Example:
        >>> rows_of({"input_ids": torch.tensor([[1], [2]]), "domain": "code", "columns": ["a", "b"]}, [1])
        {'input_ids': tensor([[2]]), 'domain': 'code', 'columns': ['b']}
    """
    chosen = list(rows)
    found: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            found[key] = value[chosen]
        else:
            found[key] = [value[n] for n in chosen] if isinstance(value, (list, tuple)) else value
    return found
