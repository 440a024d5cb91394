"""Show what the policy says: sample completions of the latest rollout as text in TensorBoard and as JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from nspo_lightning.atomic import json_text
from nspo_lightning.callbacks.protocols import KeepsRollout
from nspo_lightning.evaluation.tables import markdown_blocks


class SampleCompletions(Callback):
    """Log a few completions every so many training steps.

    Reads the LightningModule's `last_rollout`, see `KeepsRollout`; does nothing for other modules.

    Args:
        every_n_steps: Training steps between two samples.
        number: Completions in a sample, spread over the groups.
        jsonl: Also append them to ``completions.jsonl`` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 20, number: int = 6, jsonl: bool = True) -> None:
        if every_n_steps < 1 or number < 1:
            raise ValueError(f"`every_n_steps` and `number` must be at least 1, got {every_n_steps} and {number}.")
        self.every_n_steps = every_n_steps
        self.number = number
        self.jsonl = jsonl
        self._folder: Path | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir  # all ranks must ask together: the first tells the others
        self._folder = Path(folder) if folder else None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rollout = pl_module.last_rollout if isinstance(pl_module, KeepsRollout) else None
        if (
            not trainer.is_global_zero
            or rollout is None
            or trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_steps
        ):
            return
        rows = rollout.rows()
        rows = rows[:: max(len(rows) // self.number, 1)][: self.number]
        if not rows:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("completions", markdown_blocks(rows), trainer.global_step)
        if self.jsonl and self._folder is not None:
            with (self._folder / "completions.jsonl").open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json_text({"step": trainer.global_step, **row}) + "\n")
