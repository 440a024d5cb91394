"""A pull back to the base on general text: the penalty that a null space is to be compared with."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer
from typing_extensions import override

from nspo_lightning.callbacks.null_space.basis_source import calibration_batches
from nspo_lightning.callbacks.protocols import HasCalibrationText
from nspo_lightning.callbacks.text_gradients import check_takes_text, mean_gradients, trained_by
from nspo_lightning.compat.lightning import datamodule_of
from nspo_lightning.nullspace import BasisSettings


class GeneralKL(Callback):
    """Add `coefficient` times KL(base || policy) on general text to the loss of every update.

    The text is what a null space would be computed from, all real tokens of it, its rows taken in turn. The term's
    gradient is added before each optimizer step, before clipping, one batch's graph at a time; a run that goes on does
    so to the bit. Updates that are skipped for want of a signal pull nowhere either. Logs `general_kl/train`, nats a
    token.

    Args:
        coefficient: Of the KL, in units of the loss for a nat a token.
        rows: Calibration rows an update, rounded up to whole batches.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, coefficient: float = 1.0, rows: int = 64) -> None:
        if not (coefficient > 0 and math.isfinite(coefficient)) or rows < 1:
            raise ValueError(
                f"`coefficient` must be positive and `rows` at least 1, got {coefficient} and {rows}. To train without "
                "the penalty, leave the callback out."
            )
        self.coefficient = coefficient
        self.rows = rows
        self.kl: float | None = None
        """On the rows of the last update; None before the first."""
        self._batches: list[Any] = []
        self._logged = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_takes_text(pl_module, "GeneralKL")
        owner = datamodule_of(trainer)
        if not isinstance(owner, HasCalibrationText):
            raise MisconfigurationException(
                "GeneralKL has no general text: the datamodule has no `calibration_dataloader()`. Use "
                "`AlignmentDataModule`, or add that method."
            )
        self._batches = list(calibration_batches(owner, pl_module, BasisSettings(), trainer))
        if not self._batches:
            raise MisconfigurationException("GeneralKL has no general text: `calibration_dataloader()` gives none.")

    def batches_of(self, update: int) -> list[Any]:
        """List the batches of an update: the calibration text in turn, and again from its beginning."""
        size = len(self._batches[0]["input_ids"])
        count = min(-(-self.rows // size), len(self._batches))
        return [self._batches[(update * count + i) % len(self._batches)] for i in range(count)]

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer | LightningOptimizer
    ) -> None:
        parameters, module = trained_by(optimizer), check_takes_text(pl_module, "GeneralKL")
        batches = self.batches_of(trainer.global_step)
        gradients, self.kl = mean_gradients(module, batches, "kl", parameters, pl_module.device)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            pull = gradient.mul_(self.coefficient)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        self._logged = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._logged and self.kl is not None:
            pl_module.log("general_kl/train", self.kl, on_step=True, on_epoch=False, batch_size=1)
        self._logged = True

    def held_bytes(self) -> int:
        """Return the bytes of the text."""
        tensors = (part for batch in self._batches for part in batch.values() if hasattr(part, "nbytes"))
        return sum(int(part.nbytes) for part in tensors)
