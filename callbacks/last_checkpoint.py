"""`last.ckpt`: the last state of a run, at a stated interval and at its end, whatever other checkpoints it keeps."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.exact_resume import ExactResume
from nspo_lightning.checkpoints import LAST_FILE
from nspo_lightning.compat.lightning import (
    callbacks_of,
    checkpoint_folder,
    checkpoint_state,
    is_fast_dev_run,
    model_checkpoints,
)

EVERY_N_UPDATES = 10
EVERY_MINUTES = 5.0


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` into the run's ``checkpoints/``: all that is lost by ``kill -9`` is the interval.

    It is written after the first update (a full disk is found early), then whenever so many updates or minutes have
    passed since, whichever comes first; whenever a `ModelCheckpoint` has written a file; and at the end of training.
    `LastOnException` writes it on the other ways out. A `ModelCheckpoint` of the same folder leaves ``last.ckpt`` to
    this callback: its own `save_last` would write the last of its best ones only.

    Put it behind all other callbacks: its file then holds what they decided.

    Args:
        every_n_updates: Updates from one to the next; None = no such interval.
        every_minutes: Minutes from one to the next; None = no such interval.

    Raises:
        MisconfigurationException: If an interval is not positive.
    """

    def __init__(
        self, every_n_updates: int | None = EVERY_N_UPDATES, every_minutes: float | None = EVERY_MINUTES
    ) -> None:
        for name, value in (("every_n_updates", every_n_updates), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise MisconfigurationException(
                    f"`LastCheckpoint.{name}` must be positive, got {value}. Give null for no such interval."
                )
        self.every_n_updates = every_n_updates
        self.every_minutes = every_minutes
        self.path: Path | None = None
        """Where it writes, once a fit has begun."""
        self._step = 0
        self._time = 0.0
        self._others: list[Any] = []
        self._sums: list[float] = []
        self._relieved: list[ModelCheckpoint] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(ranks.broadcast_object(str(checkpoint_folder(trainer)), 0))
        self.path = folder / LAST_FILE
        for callback in model_checkpoints(trainer):
            same = callback.dirpath is not None and Path(callback.dirpath).resolve() == folder.resolve()
            if same and callback.save_last and callback.CHECKPOINT_NAME_LAST + callback.FILE_EXTENSION == LAST_FILE:
                callback.save_last = False
                self._relieved.append(callback)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due(trainer) or (self._has_changed(trainer) and _stops_within_epoch(trainer)):
            self.write(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        # A callback may have put earlier weights back, or decided to stop.
        if self._is_due(trainer) or _stops_within_epoch(trainer):
            self.write(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Where a run stops within an epoch the file is there, and says so: this moment is after the epoch's end.
        if self._has_changed(trainer) or trainer.is_last_batch:
            self.write(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        moved = ranks.any_rank(_sums(trainer) != self._sums)  # a callback may have put earlier weights back
        if self._has_changed(trainer) or (moved and trainer.global_step > 0):
            self.write(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        waited = self.every_minutes is not None and time.monotonic() - self._time >= 60 * self.every_minutes
        if trainer.world_size > 1 and self.every_minutes is not None:
            waited = ranks.any_rank(waited)
        taken = trainer.global_step - self._step
        enough = self.every_n_updates is not None and taken >= self.every_n_updates
        first = self._step == 0 and taken > 0
        return waited or enough or first or _written_by_others(trainer) != self._others

    def _has_changed(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step > self._step or _written_by_others(trainer) != self._others

    def write(self, trainer: pl.Trainer) -> None:
        """Write the file now."""
        if self.path is None or is_fast_dev_run(trainer):
            return
        resume = next((c for c in callbacks_of(trainer) if isinstance(c, ExactResume)), None)
        for callback in self._relieved:
            callback.last_model_path = str(self.path)  # whoever asks it finds the file
        with nullcontext() if resume is None else resume.beside_others():
            trainer.save_checkpoint(self.path, weights_only=False)
        self._note(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()
        self._others, self._sums = _written_by_others(trainer), _sums(trainer)


def _written_by_others(trainer: pl.Trainer) -> list[Any]:
    return [(checkpoint_state(c)["last_file"], c.best_model_path) for c in model_checkpoints(trainer)]


def _sums(trainer: pl.Trainer) -> list[float]:
    """Return a sum of each trained parameter of this rank: other weights have others."""
    trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
    sums = [ranks.local_part(parameter.detach()).float().sum() for parameter in trained]
    return [float(value) for value in torch.stack([value.cpu() for value in sums])] if sums else []


def _stops_within_epoch(trainer: pl.Trainer) -> bool:
    steps = trainer.max_steps
    reached = steps is not None and 0 <= steps <= trainer.global_step
    return (trainer.should_stop or reached) and not trainer.is_last_batch
