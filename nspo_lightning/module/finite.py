"""What is not finite is kept away from weights and optimizer state: what is looked at, and when a run gives up."""

from __future__ import annotations

import math
from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.terminal import counted

LARGEST_GRADIENT = 1e19
"""Adam keeps the square of a gradient in float32, which is infinite from 1.8e19 on."""


class NonFiniteError(ValueError):
    """Too many updates in a row were skipped because something was not finite."""

    fails_again = True
    raised_on_all_ranks = True
    """Ranks agree on each skipped update, so they also count alike."""


def on_any_rank(seen: str, what: str) -> str:
    """Return what this rank saw, or that another one did; "" if nobody saw anything (cross-rank synchronisation)."""
    return (seen or f"another rank's {what}") if ranks.any_rank(bool(seen)) else ""


def loss_scale(trainer: pl.Trainer) -> float | None:
    """Return what a gradient scaler multiplies the loss with (float16); None without one."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return None if scaler is None else float(scaler.get_scale())


def nonfinite_in(values: dict[str, Tensor]) -> str:
    """Name the first value that is not finite, with how many of its entries and the first of them; "" if all are."""
    for name, value in values.items():
        bad = value.detach()[~torch.isfinite(value)] if value.ndim else value.detach().reshape(1)
        if bad.numel() and not bool(torch.isfinite(bad).all()):
            return f"{name}: {bad.numel()} of {value.numel()} not finite, the first {float(bad[0])}"
    return ""


def nonfinite_gradient(parameters: Iterable[nn.Parameter]) -> str:
    """Say which gradients would put something that is not finite into a weight or an optimizer's state; "" if none."""
    gradients = [ranks.local_part(p.grad.detach()) for p in parameters if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients or bool(nn.utils.get_total_norm(gradients, math.inf) <= LARGEST_GRADIENT):
        return ""
    largest = torch.stack([torch.linalg.vector_norm(gradient.float(), math.inf) for gradient in gradients])
    bad = ~(largest <= LARGEST_GRADIENT)  # NaN compares as False
    return f"gradient: of {int(bad.sum())} of {len(gradients)} parameters, the first {float(largest[bad][0]):.3g}"


def scale_gradients_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    for parameter in parameters if factor != 1 else ():
        if parameter.grad is not None:
            parameter.grad *= factor


def nonfinite_message(seen: str, in_a_row: int, update: int) -> str:
    """Say what ended a run, what was `seen` last, and why that may be."""
    return (
        f"{counted(in_a_row, 'update was', 'updates in a row were')} skipped because something was not "
        f"finite (update {update}, last seen: {seen}). No weight and no optimizer state has taken any of it. Likely "
        "causes, the likeliest first: a learning rate that is too high (look at `loss`, `kl` and `entropy` before it "
        "began); overflow in 16-bit floating point (`--trainer.precision bf16-mixed` instead of 16-mixed); a reward "
        "that divides by zero or takes a logarithm of zero; many steps on one rollout, which let ratios explode "
        "(`num_iterations`, `num_minibatches`); a damaged base model. Change what it was and go on from an earlier "
        "checkpoint, or allow more by `--model.max_nonfinite_updates`."
    )
