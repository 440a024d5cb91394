"""Forward passes of a LightningModule outside its training step, and the check that its outputs did not move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import first_floating, move_call
from nspo_lightning.nullspace import ForwardCall
from nspo_lightning.nullspace.modes import adapters_off, evaluation_mode

_OUTPUT_SAMPLES = 1_000_000  # entries of the reference output that are kept (4 MB)


@contextmanager
def inference(trainer: pl.Trainer | None, pl_module: pl.LightningModule, *, adapters: bool = False) -> Iterator[None]:
    """Run forwards without gradients, in eval mode, in the Trainer's precision; modes are restored one by one.

    Args:
        trainer: Its precision plugin decides about autocast; None = the module as it is.
        pl_module: The module.
        adapters: False = adapters are switched off meanwhile, where the model offers that.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if trainer is not None:
            stack.enter_context(trainer.precision_plugin.forward_context())
        if not adapters:
            stack.enter_context(adapters_off(pl_module))
        stack.enter_context(evaluation_mode(pl_module))
        try:
            yield
        finally:
            ranks.reshard(pl_module)


class OutputCheck:
    """A sample of the outputs on one calibration batch before training, and how far they have moved since.

    Args:
        call: The batch, on the CPU.
        reference: The outputs before training; None = the module returns none.
    """

    def __init__(self, call: ForwardCall, reference: Tensor | None) -> None:
        self._call, self._reference = call, reference

    @classmethod
    def before_training(
        cls, call: ForwardCall | None, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> OutputCheck | None:
        """Take the reference, with adapters off: on resume it is still the model that training started from."""
        return None if call is None else cls(call, _outputs(call, trainer, pl_module, adapters=False))

    def change(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
        """Return the largest change of an output, relative to the largest output; None where it is not defined."""
        if self._reference is None:
            return None
        now = _outputs(self._call, trainer, pl_module, adapters=True)
        if now is None or now.shape != self._reference.shape:
            return None
        scale = self._reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return float((now - self._reference).abs().max() / scale)


def _outputs(call: ForwardCall, trainer: pl.Trainer, pl_module: pl.LightningModule, *, adapters: bool) -> Tensor | None:
    call = move_call(call, pl_module.device)
    with inference(trainer, pl_module, adapters=adapters):
        output = first_floating(pl_module(*call.args, **call.kwargs))
    if output is None:
        return None
    rows = output.reshape(-1, output.shape[-1])
    if call.mask is not None and call.mask.numel() == rows.shape[0]:
        rows = rows[call.mask.reshape(-1).ne(0)]
    flat = rows.reshape(-1)
    return flat[:: max(flat.numel() // _OUTPUT_SAMPLES, 1)].to(device="cpu", dtype=torch.float32)
