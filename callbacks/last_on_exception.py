"""Leave a checkpoint that resumes, whatever ends a run: Ctrl-C, SIGTERM (preemption), SIGHUP, an exception."""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.end_together import set_exit_code_
from nspo_lightning.callbacks.exact_resume import ExactResume
from nspo_lightning.callbacks.last_checkpoint import LastCheckpoint
from nspo_lightning.callbacks.protocols import FailsAgain
from nspo_lightning.checkpoints import LAST_FILE
from nspo_lightning.compat.lightning import callbacks_of, keep_signal_handlers, model_checkpoints

_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # a terminal that is closed; not there on Windows
_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None)
_BUSY = frozenset({"update", "batch_end", "validation_end", "epoch_end", "train_end"})
_HOW_OLD = {"train_end": "has the end of the training", "elsewhere": "stays as it was"}


class LastOnException(Callback):
    """On Ctrl-C, SIGTERM, SIGHUP or an exception in training, save ``last.ckpt``, where `LastCheckpoint` writes it.

    Without that callback it is written where the first `ModelCheckpoint` keeps its files.

    ``--ckpt_path last`` finds it. The signals end a run at once while it loads, calibrates, samples, judges, validates
    or computes a loss (nothing is lost but that step); while weights change or a file is written they wait until that
    is done, and what measures then stops within a batch of it. A second Ctrl-C does not wait. With several processes
    none may leave alone: a signal to any of them is noted, and all stop together at the next batch of whatever is done.
    One that comes when all is measured changes nothing any more. `validate`, `test` and `predict` hear them likewise.

    Needs `ExactResume` among the callbacks to know where the run is. (Lightning's `OnExceptionCheckpoint` removes its
    file at the end of the next good run, so it can't share that name.)
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: int | None = None
        self._shared = False
        self._even = False
        self._raised = False

    # ------------------------------------------------------------------ signals

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
        self._shared, self._waiting, self._raised = trainer.world_size > 1, None, False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if number == _HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, lambda n, frame: self._on_signal(trainer, n, frame))
        keep_signal_handlers(trainer, tuple(self._handlers))

    def is_told_to_stop(self, trainer: pl.Trainer) -> bool:
        """Return whether a signal waits, here or on another rank; see `HearsSignals`."""
        return ranks.any_rank(self._waiting is not None) if self._shared else self._waiting is not None

    def stop_if_told(self, trainer: pl.Trainer) -> None:
        """Stop if a signal waits, here or on another rank; see `HearsSignals`."""
        if self._shared:
            if not self.is_told_to_stop(trainer):
                return
            ended = self._waiting is not None and self._waiting != signal.SIGINT
            self._waiting = signal.SIGTERM if ranks.any_rank(ended) else signal.SIGINT
        self._raise(together=self._shared)

    def _on_signal(self, trainer: pl.Trainer, number: int, frame: FrameType | None) -> None:
        resume = _resume(trainer)
        if self._raised and number != signal.SIGINT:
            return  # its exception is on its way: a second one would get between it and the checkpoint
        again, self._waiting = self._waiting is not None, number
        if self._shared:
            if again and number == signal.SIGINT:
                self._raise()
            return  # nothing collective in here: it may have come in the middle of a collective operation
        if resume is None or resume.moment not in _BUSY or (again and number == signal.SIGINT):
            self._raise()

    def _raise(self, *, together: bool = False) -> None:
        number, self._waiting = self._waiting, None
        if number is not None:
            self._raised = True
            stop: Any = KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException(128 + number)
            stop.raised_on_all_ranks = together
            raise stop

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_told(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._raised = False
        self.stop_if_told(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, trainer.num_predict_batches)

    def _begin(self, trainer: pl.Trainer, batches: list[int | float]) -> None:
        self.stop_if_told(trainer)
        # Where ranks have different numbers of batches, they can't ask together before each.
        alike = all(other == batches for other in ranks.gather_objects(batches))
        self._even = self._shared and alike and float("inf") not in batches

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._even:
            self.stop_if_told(trainer)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_told(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    # ------------------------------------------------------------------ the checkpoint

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for number in self._handlers:  # nothing interrupts the save
            signal.signal(number, signal.SIG_IGN)
        try:
            self._save(trainer, exception)
        finally:
            self._release()

    @staticmethod
    def _save(trainer: pl.Trainer, exception: BaseException) -> None:
        set_exit_code_(exception)
        path = _path(trainer)
        alone = trainer.world_size == 1 or ranks.raised_on_all_ranks(exception)
        if trainer.state.fn != "fit" or path is None or trainer.global_step == 0 or not alone:
            return  # nothing was learnt yet, or other ranks may never come to the collective save
        name = type(exception).__name__
        resume = _resume(trainer)
        if not _is_settled(trainer, resume):
            if path.exists():
                moment = "elsewhere" if resume is None else resume.moment
                rank_zero_info(
                    f"{name}: {path} {_HOW_OLD.get(moment, 'is from before this update')}. {_how_to_go_on(exception)}"
                )
            return
        try:
            with nullcontext() if resume is None else resume.beside_others():
                trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:  # what ended the run must not be hidden by it
            rank_zero_info(str(error))
        else:
            rank_zero_info(f"{name}: state saved to {path}. {_how_to_go_on(exception)}")


def _path(trainer: pl.Trainer) -> Path | None:
    """Return where to write; None without callbacks that write checkpoints."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, LastCheckpoint):
            return callback.path
    places = [callback for callback in model_checkpoints(trainer) if callback.dirpath]
    if not places:
        return None
    path = Path(str(places[0].dirpath)) / LAST_FILE
    for callback in places:
        if callback.dirpath == places[0].dirpath and callback.save_last:
            callback.last_model_path = str(path)  # so that it writes there again after the resume
    return path


def _how_to_go_on(exception: BaseException) -> str:
    if isinstance(exception, FailsAgain) and exception.fails_again:
        return "With the same settings it would end so again: mend what the message names, then use `--ckpt_path last`."
    return "Go on with `--ckpt_path last`."


def _resume(trainer: pl.Trainer) -> ExactResume | None:
    return next((c for c in callbacks_of(trainer) if isinstance(c, ExactResume)), None)


def _is_settled(trainer: pl.Trainer, resume: ExactResume | None) -> bool:
    """Return whether a checkpoint of this moment would resume exactly: no weight or callback is half-way."""
    if resume is None:
        return trainer.training
    if resume.moment in {"step", "validation"}:
        return True
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    hooks_are_done = trainer.training and batches.completed == batches.processed
    return resume.moment in {"batch_end", "validation_end"} and hooks_are_done
