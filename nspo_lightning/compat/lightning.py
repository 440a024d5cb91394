"""Lightning: private names, and public ones that its types do not know."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

_STEPPED = "_batches_that_stepped"
"""Entry of a checkpoint's ``epoch_loop.state_dict``, and attribute of the running loop."""

_LOADER_STATES = "_combined_loader_states_to_load"
"""Attribute of the fit loop: what it has read of a checkpoint and not given to its loaders."""

BATCHES = "epoch_loop.batch_progress"
OPTIMIZERS = "epoch_loop.automatic_optimization.optim_progress"
VALIDATION_BATCHES = "epoch_loop.val_loop.batch_progress"
"""Entries of a checkpoint's ``loops.fit_loop``: where the loops are, as counters."""
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, as Lightning calls it."""
COUNTERS = ("ready", "started", "processed", "completed")

_CHECKPOINT_STATE = {
    "last_step": ("_last_global_step_saved", 0),
    "deferred": ("_defer_save_until_validation", False),
    "last_file": ("_last_checkpoint_saved", ""),
}
"""What `ModelCheckpoint` remembers and its `state_dict` lacks: our name -> (attribute, value before any save)."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the Trainer's callbacks (public, but set by a connector that types do not see)."""
    return cast("list[pl.Callback]", trainer.callbacks)  # type: ignore[attr-defined]


def datamodule_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """Return the Trainer's datamodule, None without one (likewise)."""
    return cast("pl.LightningDataModule | None", trainer.datamodule)  # type: ignore[attr-defined]


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return a module's Trainer; None while it has none (its `trainer` then raises)."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def is_fast_dev_run(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer only tries the code out (likewise)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def logging_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's loggers are given in training: batches after which an optimizer stepped."""
    return int(vars(trainer.fit_loop.epoch_loop)[_STEPPED])


def logs_this_batch(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer writes metrics at the end of this batch (the rule of its logger connector)."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(trainer.loggers) and every > 0 and (logging_step(trainer) + 1) % every == 0


def forget_step_metrics(trainer: pl.Trainer, batch_idx: int, prefix: str = "") -> None:
    """Leave what was logged at earlier updates out of this one's point, so that curves show what was measured alone.

    Lightning writes the last value of a metric at every step again, whether or not it was logged at that step. To be
    called as a batch starts; within an accumulation window what its earlier batches logged stays.

    Args:
        trainer: In training.
        batch_idx: The batch's number in the epoch.
        prefix: Which metrics, by how their names start.
    """
    if batch_idx % trainer.accumulate_grad_batches:
        return
    for metric in trainer.fit_loop.epoch_loop._results.values():
        meta = metric.meta
        if meta.on_step and not meta.on_epoch and meta.name.startswith(prefix):
            metric.reset()


def take_back_step_(fit_loop: dict[str, Any]) -> None:
    """Lower the count of batches that stepped by one in a checkpoint's ``loops.fit_loop``."""
    fit_loop["epoch_loop.state_dict"][_STEPPED] -= 1


def load_place_in_data_(trainer: pl.Trainer) -> None:
    """Give training loaders their state of a checkpoint in any case, before the first epoch of a resumed run begins.

    Lightning leaves it out where the checkpoint is of the end of an epoch, as if each epoch began anew.
    """
    states = vars(trainer.fit_loop)[_LOADER_STATES]
    if states:
        vars(trainer.fit_loop)["_combined_loader"]._load_state_dicts(states)
        vars(trainer.fit_loop)[_LOADER_STATES] = []


def checkpoint_state(callback: ModelCheckpoint) -> dict[str, Any]:
    """Return what the callback's next decision needs and its `state_dict` lacks, as plain values."""
    values = {name: vars(callback).get(attribute, start) for name, (attribute, start) in _CHECKPOINT_STATE.items()}
    return values | {"last_file": str(values["last_file"])}


def restore_checkpoint_state_(callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Set what `checkpoint_state` returned; names that are missing stay as they are."""
    for name, value in state.items():
        setattr(callback, _CHECKPOINT_STATE[name][0], value)


def started_processes(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the very list of processes that Lightning's script launcher started and watches; empty without any."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def keep_signal_handlers(trainer: pl.Trainer, numbers: Collection[int]) -> None:
    """Have the Trainer's next run leave the handlers of some signals as they are.

    Lightning sets its own late in a run, over whatever is there, and puts back what it found when training is over.
    Its handler of SIGTERM sends a collective message from wherever the process is.
    """
    connector = trainer._signal_connector

    def register() -> None:
        del connector.register_signal_handlers  # once
        kept = {number: signal.getsignal(number) for number in numbers}
        connector.register_signal_handlers()
        for number, handler in kept.items():
            connector._original_handlers.pop(signal.Signals(number), None)
            signal.signal(number, handler)

    connector.register_signal_handlers = register  # type: ignore[method-assign]


def model_checkpoints(trainer: pl.Trainer) -> Sequence[ModelCheckpoint]:
    """Return the Trainer's checkpoint callbacks that are of Lightning's own kind."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """Return where a Trainer's checkpoints go if nothing else is said: `ModelCheckpoint`'s rule, without its instance.

    Ranks may see different ones: a logger numbers its folder on the first alone.
    """
    logger = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir) / CHECKPOINTS
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / CHECKPOINTS


def process_group_timeout(strategy: Strategy) -> timedelta | None:
    """Return how long the other processes wait in a collective operation; None where no strategy of ours says so."""
    return strategy._timeout if isinstance(strategy, DDPStrategy) else None
