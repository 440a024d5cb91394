"""Forward passes of a LightningModule outside its training step, and the check that its outputs did not move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import first_floating, move_call
from nspo_lightning.callbacks.protocols import HasCalibrationForward
from nspo_lightning.nullspace import ForwardCall
from nspo_lightning.nullspace.modes import evaluation_mode

_OUTPUT_SAMPLES = 1_000_000  # entries of the reference outputs that are kept (4 MB)


@contextmanager
def inference(trainer: pl.Trainer | None, pl_module: pl.LightningModule) -> Iterator[None]:
    """Run forwards without gradients, in eval mode, in the Trainer's precision; modes are restored one by one.

    Args:
        trainer: Its precision plugin decides about autocast; None = the module as it is.
        pl_module: The module.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if trainer is not None:
            stack.enter_context(trainer.precision_plugin.forward_context())
        stack.enter_context(evaluation_mode(pl_module))
        try:
            yield
        finally:
            ranks.reshard(pl_module)


def calibration_forward(pl_module: pl.LightningModule) -> Callable[..., Any]:
    """Return the forward that calibration runs: the module's own, or a cheaper one that reaches the same layers."""
    return pl_module.calibration_forward if isinstance(pl_module, HasCalibrationForward) else pl_module


def plain_outputs(call: ForwardCall, pl_module: pl.LightningModule) -> Tensor:
    """Return what the module's own forward gives at all positions that count, float32; inside `inference`.

    Raises:
        MisconfigurationException: If it gives nothing that could be compared.
    """
    output = first_floating(pl_module(*call.args, **call.kwargs))
    if output is None:
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.forward returns no floating-point tensor, so it can't be seen whether outputs "
            "on calibration text stay. Return the outputs (or an object with `logits`), or set `verify: false`."
        )
    if call.mask is not None and output.shape[: call.mask.ndim] == call.mask.shape:
        output = output[call.mask.ne(0)]
    return output.detach().float()


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
        """Return the largest change of an output, relative to the largest output; None without any text."""
        if not self._calls:
            return None
        now = self._outputs(trainer, pl_module)
        scale = self._reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return float((now - self._reference).abs().max() / scale)

    def _outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        parts, most = [torch.zeros(0)], max(_OUTPUT_SAMPLES // max(len(self._calls), 1), 1)
        with inference(trainer, pl_module):
            for call in self._calls:
                flat = plain_outputs(move_call(call, pl_module.device), pl_module).reshape(-1)
                parts.append(flat[:: max(flat.numel() // most, 1)].cpu())
        return torch.cat(parts)
