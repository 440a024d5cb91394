"""Show what the policy says: sample completions of the latest rollout as text in TensorBoard and as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override


class HasRows(Protocol):
    """A judged rollout."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict a completion, with `prompt` and `completion`."""


@runtime_checkable
class KeepsRollout(Protocol):
    """A LightningModule that keeps what it rolled out last."""

    last_rollout: HasRows | None


class SampleCompletions(Callback):
    """Log a few completions of the LightningModule's `last_rollout` every so many training steps.

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
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("completions", _markdown(rows), trainer.global_step)
        if self.jsonl and self._folder is not None:
            with (self._folder / "completions.jsonl").open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({"step": trainer.global_step, **row}, ensure_ascii=False) + "\n")


def _markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>").replace("<|", "&lt;|")

    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([cell(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
