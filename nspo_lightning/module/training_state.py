"""What rewards are told about training, read off the Trainer."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn

from nspo_lightning.module.progress import Progress
from nspo_lightning.rewards.trainer_state import TrainerState


def trainer_state(trainer: pl.Trainer, progress: Progress, prompts: int) -> TrainerState:
    """Return where training is; without a fit, where it was in the checkpoint.

    Args:
        trainer: Runs the module.
        progress: The module's.
        prompts: In this rank's batch.
    """
    process = {
        "num_input_tokens_seen": progress.num_tokens,
        "logging_steps": trainer.log_every_n_steps,  # type: ignore[attr-defined]
        "is_world_process_zero": trainer.is_global_zero,
        "is_local_process_zero": trainer.local_rank == 0,
    }
    if trainer.state.fn != TrainerFn.FITTING:
        return TrainerState(global_step=progress.steps, **process)
    batches, passes = trainer.num_training_batches, trainer.max_epochs
    part = trainer.fit_loop.batch_idx / batches if batches and math.isfinite(batches) else 0.0
    return TrainerState(
        epoch=trainer.current_epoch + part,
        global_step=trainer.global_step,
        max_steps=_end(trainer),
        num_train_epochs=passes if passes is not None and passes > 0 else None,
        train_batch_size=prompts,
        **process,
    )


def _end(trainer: pl.Trainer) -> int | None:
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # the number of accumulated batches changes on the way
        steps = trainer.max_steps
    return int(steps) if math.isfinite(steps) and steps > 0 else None
