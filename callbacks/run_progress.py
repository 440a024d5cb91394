"""The progress of a Trainer's loops: bars in a terminal, a line a minute in a log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from nspo_lightning.callbacks.batch_rows import BatchRows
from nspo_lightning.terminal import Advance, rows_progress


class RunProgress(ProgressBar):
    """Show steps done, time left and the metrics that are logged with `prog_bar`, and the rows of each evaluation.

    One bar stands for the whole training; evaluation inside of it has one below it while it lasts. Where there is no
    terminal, training says a line a minute instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._training, self._evaluation = ExitStack(), ExitStack()
        self._trained: Advance | None = None
        self._evaluated: Advance | None = None
        self._rows = BatchRows((), ())
        self._step = self._counted = 0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    # ------------------------------------------------------------------ training

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._trained is not None:  # it begins with the first batch: others still prepare as training starts
            return
        steps, self._step = trainer.estimated_stepping_batches, trainer.global_step
        total = int(steps) if math.isfinite(steps) and steps > 0 else None
        self._trained = self._training.enter_context(
            rows_progress("Training", total, unit="step", done=self._step, visible=self._enabled)
        )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trained is not None and self._enabled:
            new, self._step = trainer.global_step - self._step, trainer.global_step
            self._trained(new, note=metrics_text(trainer.progress_bar_metrics))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = None
        self._training.close()

    # ------------------------------------------------------------------ evaluation

    def _begin(self, label: str, loaders: Any, batches: Sequence[float]) -> None:
        self._end()
        self._counted = 0
        self._rows = BatchRows(loaders if isinstance(loaders, (list, tuple)) else [loaders], batches)
        self._evaluated = self._evaluation.enter_context(
            rows_progress(label, self._rows.total, unit=self._rows.unit, visible=self._enabled)
        )

    def _count(self, batch_idx: int, dataloader_idx: int) -> None:
        if self._evaluated is None:
            return
        rows = self._rows.of(dataloader_idx, batch_idx)
        self._counted += rows
        self._evaluated(rows)
        if self._counted == self._rows.total:
            self._end()  # what is measured next, within the same validation, has a bar of its own

    def _end(self) -> None:
        self._evaluated = None
        self._evaluation.close()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        label, batches = "Validation", trainer.num_val_batches
        if trainer.sanity_checking:
            label, batches = self.sanity_check_description, trainer.num_sanity_val_batches
        self._begin(label, trainer.val_dataloaders, batches)

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(self.test_description, trainer.test_dataloaders, trainer.num_test_batches)

    @override
    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(batch_idx, dataloader_idx)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(self.predict_description, trainer.predict_dataloaders, trainer.num_predict_batches)

    @override
    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(batch_idx, dataloader_idx)

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    # ------------------------------------------------------------------ the end, however it comes

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()
        self.on_train_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return logged metrics in one line, shares in per cent, without their folders: `reward 0.31, accuracy 95 %`."""
    said = []
    for name, value in metrics.items():
        number = float(value)
        is_share = name in ("unsafe", "answered") or name.endswith(("_rate", "accuracy"))
        short = name.rpartition("/")[2]
        said.append(f"{short} {100 * number:.0f} %" if is_share else f"{short} {number:.3g}")
    return ", ".join(said)
