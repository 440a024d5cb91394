"""Put into every checkpoint what decides the future and Lightning leaves out, so that a resumed run is the same run.

That is: the state of all random generators; the gradients of an unfinished accumulation window; whether a stop was
decided already; the metrics that `ModelCheckpoint` compares with, and what it wrote last; and counters from which the
loops find their place, see `loop_progress`. Weights, optimizer, scheduler, the callbacks' own states and the place in
the data are in there anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.protocols import KeepsStepState
from nspo_lightning.callbacks.resume.loop_progress import Moment, in_window, settle
from nspo_lightning.callbacks.resume.random_state import random_state, set_random_state
from nspo_lightning.compat.lightning import checkpoint_state, model_checkpoints, restore_checkpoint_state_


class ExactResume(Callback):
    """Makes `--ckpt_path` go on as if nothing had happened, whatever moment a checkpoint was written at.

    Attributes:
        moment: Where the run is. Checkpoints that are written at ``update``, while weights change, resume as
            Lightning's do; at all other moments they resume exactly.
        saved_on_exception: Set while a checkpoint is written that no `ModelCheckpoint` asked for, see `beside_others`.
    """

    def __init__(self) -> None:
        self.moment: Moment = "elsewhere"
        self.saved_on_exception = False
        self._state: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._before: tuple[dict[str, Any], dict[str, Any] | None] | None = None

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Write a checkpoint that no `ModelCheckpoint` asked for: none of them will take it for its own."""
        self.saved_on_exception = True
        try:
            yield
        finally:
            self.saved_on_exception = False

    # ------------------------------------------------------------------ resuming

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.moment = "elsewhere"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._state:  # the same noise whether a calibration is made now or found in the cache
            self._random = random_state()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._state = dict(checkpoint.get(type(self).__name__, {}))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state, self._state = self._state, {}
        if not state:
            return
        trainer.should_stop = trainer.should_stop or state["should_stop"]
        trainer.callback_metrics.update(state["callback_metrics"])
        _restore_checkpoint_callbacks(trainer, state)
        if len(state["ranks"]) == trainer.world_size:  # with another number of ranks there is no same run
            mine = state["ranks"][trainer.global_rank]
            self._random, self._gradients = mine["random"], mine["grads"]

    def _enter(self, pl_module: pl.LightningModule) -> None:
        """Set the generators where the interrupted run had them, after everything that happens before training."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        for name, parameter in pl_module.named_parameters() if self._gradients else ():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}

    # ------------------------------------------------------------------ moments

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter(pl_module)
        self._before = (random_state(), pl_module.step_state() if isinstance(pl_module, KeepsStepState) else None)
        self.moment = "step"

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.moment = "update"

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.moment, self._before = "batch_end", None

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._enter(pl_module)
            self.moment = "validation"

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.moment == "validation":
            self.moment = "validation_end"

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.moment = "epoch_end"

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.moment = "train_end"

    # ------------------------------------------------------------------ saving

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        noise, step_state = self._before or (random_state(), None)
        if self.moment != "step":
            noise = random_state()
        elif step_state is not None and isinstance(pl_module, KeepsStepState):
            pl_module.step_state_to_save = step_state
        settle(checkpoint["loops"]["fit_loop"], trainer, self.moment)
        window = self.moment in {"step", "batch_end", "validation", "validation_end"} and in_window(trainer)
        mine = {"random": noise, "grads": _gradients(pl_module) if window else {}}
        checkpoint[type(self).__name__] = {
            "should_stop": trainer.should_stop,
            "callback_metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "checkpoint_callbacks": {c.state_key: checkpoint_state(c) for c in model_checkpoints(trainer)},
            "saved_on_exception": self.saved_on_exception,
            "ranks": ranks.gather_objects(mine),
        }


def _gradients(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    return {
        name: parameter.grad.detach().to("cpu", copy=True)
        for name, parameter in pl_module.named_parameters()
        if parameter.grad is not None
    }


def _restore_checkpoint_callbacks(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    for callback in model_checkpoints(trainer):
        saved = state["checkpoint_callbacks"].get(callback.state_key)
        if saved is None:
            continue
        own = {callback.last_model_path, callback.best_model_path, *callback.best_k_models}
        resumed = Path(str(trainer.ckpt_path)).resolve()
        if not state["saved_on_exception"] and any(path and Path(path).resolve() == resumed for path in own):
            # It noted what it wrote only after the file was complete, so the file doesn't know.
            saved = saved | {"last_step": trainer.global_step, "last_file": str(trainer.ckpt_path)}
        restore_checkpoint_state_(callback, saved)
