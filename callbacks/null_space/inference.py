"""Forward passes of a LightningModule outside its training step, and the check that its outputs did not move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import floating_tensors, move_call
from nspo_lightning.callbacks.null_space.forward import plain_forward
from nspo_lightning.callbacks.protocols import HasCalibrationForward
from nspo_lightning.compat.torch import full_precision_products
from nspo_lightning.nullspace import ForwardCall
from nspo_lightning.nullspace.modes import evaluation_mode

_OUTPUT_SAMPLES = 1_000_000  # entries of the reference outputs that are kept (4 MB)


@contextmanager
def inference(trainer: pl.Trainer | None, pl_module: pl.LightningModule, *, exact: bool = False) -> Iterator[None]:
    """Run forwards without gradients, in eval mode, in the Trainer's precision; modes are restored one by one.

    Args:
        trainer: Its precision plugin decides about autocast; None = the module as it is.
        pl_module: The module.
        exact: Without autocast, whose rounding would be taken for a change.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # A compiled graph may keep the hooks that it was traced with, or run none.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if trainer is not None and not (exact and isinstance(trainer.precision_plugin, MixedPrecision)):
            stack.enter_context(trainer.precision_plugin.forward_context())
        stack.enter_context(evaluation_mode(pl_module))
        try:
            yield
        finally:
            ranks.reshard(pl_module)


def calibration_forward(pl_module: pl.LightningModule) -> Callable[..., Any]:
    """Return the forward that calibration runs: the module's own, or a cheaper one that reaches the same layers."""
    return pl_module.calibration_forward if isinstance(pl_module, HasCalibrationForward) else plain_forward(pl_module)


def ready(call: ForwardCall, trainer: pl.Trainer | None, pl_module: pl.LightningModule) -> ForwardCall:
    """Return a call on the module's device, its floats in the Trainer's precision."""
    moved = move_call(call, pl_module.device)
    if trainer is None:
        return moved
    convert = trainer.precision_plugin.convert_input
    return replace(moved, args=convert(moved.args), kwargs=convert(dict(moved.kwargs)))


@full_precision_products()
def plain_outputs(call: ForwardCall, pl_module: pl.LightningModule) -> list[Tensor]:
    """Return the floating-point tensors of what the module's own forward gives, at all positions that count.

    Inside `inference`, on a `ready` call. A module that draws noise in eval mode draws the same each time. Float32
    products are float32's: the rounding of TF32 ones would be taken for a change.

    Raises:
        MisconfigurationException: If it gives nothing that could be compared.
    """
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            found = floating_tensors(plain_forward(pl_module)(*call.args, **call.kwargs))
        except NotImplementedError:
            found = []
    if not found:
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.forward returns no floating-point tensor (or there is none), so it can't be "
            "seen whether outputs on calibration text stay. Return the outputs, or set `verify: false`."
        )
    mask = call.mask
    rows = [y[mask.ne(0)] if mask is not None and y.shape[: mask.ndim] == mask.shape else y for y in found]
    return [y.detach().to(torch.promote_types(y.dtype, torch.float32)).clone() for y in rows]


class OutputCheck:
    """A sample of the outputs on some calibration text before training, and how far they have moved since.

    Args:
        calls: The text, on the CPU.
        trainer: For its precision.
        pl_module: The module; its outputs are taken as they are now.
    """

    def __init__(self, calls: Sequence[ForwardCall], trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calls = list(calls)
        self._reference = self._outputs(trainer, pl_module)

    def change(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
        """Return the largest change of an output, relative to the largest entry of its tensor; None without any."""
        found = [
            float((now - before).abs().max() / before.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
            for now, before in zip(self._outputs(trainer, pl_module), self._reference, strict=True)
            if before.numel()
        ]
        return max(found, default=None)

    def _outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
        """Return a sample of each output tensor, over the text."""
        parts: list[list[Tensor]] = []
        most = max(_OUTPUT_SAMPLES // max(len(self._calls), 1), 1)
        with inference(trainer, pl_module):
            for call in self._calls:
                try:
                    outputs = plain_outputs(ready(call, trainer, pl_module), pl_module)
                except MisconfigurationException:  # said where it matters: by the check before training
                    return []
                flat = [y.reshape(-1) for y in outputs]
                parts.append([y[:: max(y.numel() // most, 1)].float().cpu() for y in flat])
        if len({len(part) for part in parts}) > 1:
            return []
        return [torch.cat(column) for column in zip(*parts, strict=True)]
