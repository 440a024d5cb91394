"""Say in a checkpoint how far training got, in the one form for each place that Lightning's loops resume from exactly.

Lightning keeps counters (ready, started, processed, completed) and guesses the place from them. Its guesses lose the
validation that was due after the batch with which a checkpoint was written, repeat parts of a broken validation, and
take a batch too many where a checkpoint was written at the end of an epoch without validation. The functions here
rewrite the counters in the checkpoint, never in the running Trainer.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl

from nspo_lightning.compat.lightning import BATCHES, COUNTERS, OPTIMIZERS, VALIDATION_BATCHES, take_back_step_

Moment = Literal["step", "update", "batch_end", "validation", "validation_end", "epoch_end", "train_end", "elsewhere"]
"""Where a run is: in a batch before any weight changes; from its backward pass to the end of the optimizer step; in
the hooks that follow a batch; in a validation; in the hooks that end it; in the hooks that end an epoch; behind the end
of training; before its beginning, or in another command."""


def settle(fit_loop: dict[str, Any], trainer: pl.Trainer, moment: Moment) -> None:
    """Rewrite the counters of a checkpoint's ``loops.fit_loop`` in place, given where the run is."""
    batches = fit_loop[BATCHES]
    validated = fit_loop[VALIDATION_BATCHES]
    begun = validated["current"]["completed"] if moment == "validation" else 0  # as if it had never been
    # A run that went on by `_validation_to_come` has begun one more than it has seen: no later file says so.
    validated["total"] |= dict.fromkeys(COUNTERS, validated["total"]["completed"] - begun)
    match moment:
        case "step":  # the batch that was begun is as if it had never been
            _set_all(batches, batches["total"]["completed"], batches["current"]["completed"])
            batches["is_last_batch"] = False
            steps = fit_loop[OPTIMIZERS]["optimizer"]["step"]
            for count in ("total", "current"):
                steps[count]["ready"] = steps[count]["completed"]
            if validation_follows(trainer, batches["current"]["completed"], batches["total"]["completed"]):
                # Lightning goes through the end of the last batch again, to pass by its validation.
                take_back_step_(fit_loop)
        case "validation":
            _validation_to_come(fit_loop)
        case "batch_end" if validation_follows(trainer, batches["current"]["ready"], batches["total"]["ready"]):
            _set_all(batches, batches["total"]["ready"], batches["current"]["ready"])
            _validation_to_come(fit_loop)
        case "epoch_end":
            epochs = fit_loop["epoch_progress"]
            _set_all(epochs, epochs["total"]["ready"], epochs["current"]["ready"])
            _set_all(batches, batches["total"]["completed"], 0)
            batches["is_last_batch"] = False
            # Only a run with a number of steps counts as restarted there, and then passes by a validation.
            restarts = trainer.max_steps != -1 and trainer.limit_val_batches
            if restarts and validation_follows(trainer, 0, batches["total"]["completed"]):
                take_back_step_(fit_loop)
        case _:
            pass


def validation_follows(trainer: pl.Trainer, in_epoch: int, in_total: int) -> bool:
    """Return whether a validation comes after so many batches of this epoch and of all epochs.

    As Lightning decides it for intervals in batches; False for intervals in time, which no resumed run repeats.
    """
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    interval = trainer.val_check_batch
    if interval is None or interval == float("inf"):
        return False
    return (in_total if every is None else in_epoch) % int(interval) == 0


def in_window(trainer: pl.Trainer) -> bool:
    """Return whether gradients of earlier batches wait for the rest of their accumulation window."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    last = done == trainer.num_training_batches or (progress.is_last_batch and done == progress.current.ready)
    return bool(done % trainer.accumulate_grad_batches) and not last


def _validation_to_come(fit_loop: dict[str, Any]) -> None:
    """Make it look like a validation that was begun and has seen no batch: Lightning then runs it whole."""
    progress = fit_loop[VALIDATION_BATCHES]
    done = progress["total"]["completed"]
    progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    progress["current"] |= dict.fromkeys(COUNTERS, 0)
    progress["is_last_batch"] = False


def _set_all(progress: dict[str, Any], total: int, current: int) -> None:
    progress["total"] |= dict.fromkeys(COUNTERS, total)
    progress["current"] |= dict.fromkeys(COUNTERS, current)
