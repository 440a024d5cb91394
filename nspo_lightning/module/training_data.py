"""What training asks of the Trainer's data: how long prompts are, and a loader that gives batches as settings need."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from nspo_lightning.compat.lightning import datamodule_of, load_place_in_data_
from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.terminal import counted


@runtime_checkable
class KnowsLongestPrompt(Protocol):
    """A datamodule that can say how long its prompts are."""

    longest_prompt_tokens: int | None


def longest_prompt_tokens(trainer: pl.Trainer) -> int:
    """Return the longest prompt of the Trainer's datamodule; 1 where that is not known."""
    datamodule = datamodule_of(trainer)
    return (datamodule.longest_prompt_tokens or 1) if isinstance(datamodule, KnowsLongestPrompt) else 1


def check_repetitions(trainer: pl.Trainer, settings: TrainingSettings) -> None:
    """Warn where batches do not come as often as a rollout of them feeds steps (the command line sees to it)."""
    loader, steps = trainer.train_dataloader, settings.steps_a_rollout
    if isinstance(loader, PromptLoader) and loader.repeat_batches != steps:
        rank_zero_warn(
            f"Each batch comes {counted(loader.repeat_batches, 'time')} (`repeat_batches`), and a rollout feeds "
            f"{counted(steps, 'training step')} (`num_iterations` x `num_minibatches`): "
            + ("some prompts are never answered" if loader.repeat_batches < steps else "prompts are answered again")
            + f". Set `repeat_batches={steps}` of the datamodule."
        )


def look_ahead(trainer: pl.Trainer, settings: TrainingSettings) -> None:
    """Have the loader show the batch that follows, where a server can draw for it meanwhile; say what that means."""
    server, loader = settings.rollout_server, trainer.train_dataloader
    if server is None or not server.overlap:
        return
    if not isinstance(loader, PromptLoader):
        rank_zero_warn(
            f"`rollout_server.overlap` has no effect: {type(loader).__name__} does not show the batch that follows, as "
            "the `PromptLoader` of this package's datamodules does. Rollouts are drawn in turn."
        )
        return
    loader.look_ahead = True
    rank_zero_info(
        "`rollout_server.overlap`: each rollout but an epoch's first is drawn while the one before is trained on, by "
        "the policy of at most one update before. A checkpoint waits for it and holds it; one that a signal or an "
        "error leaves may not, and then a resumed run draws it anew, by the policy as it is, and goes on otherwise."
    )


def take_on_demand(trainer: pl.Trainer, settings: TrainingSettings) -> None:
    """Have the loader give further prompts where dynamic sampling asks for them; say what an epoch is then.

    Raises:
        MisconfigurationException: If the loader can't.
    """
    if settings.dynamic_sampling is None:
        return
    loader = trainer.train_dataloader
    if not isinstance(loader, PromptLoader):
        raise MisconfigurationException(
            f"`dynamic_sampling` takes further prompts from the data between two batches, and {type(loader).__name__} "
            "gives none. Use a datamodule of this package (`PromptLoader`), or `dynamic_sampling: null`."
        )
    loader.on_demand = True
    load_place_in_data_(trainer)
    rank_zero_info(
        "`dynamic_sampling`: a batch takes up to "
        f"{settings.dynamic_sampling.max_factor} times {counted(loader.batch_size, 'prompt')} a process from the "
        f"data in its own order. An epoch has {counted(len(loader), 'batch')}, as without, and may go through the "
        "prompts several times."
    )


def another_step_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Tell whether another step follows in this epoch, as far as can be known: something may stop the run yet."""
    ends_window = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    is_last_update = trainer.max_steps != -1 and trainer.global_step + 1 >= trainer.max_steps
    return batch_idx + 1 < trainer.num_training_batches and not (ends_window and is_last_update)
