"""Leave a checkpoint that resumes, whatever ends a run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class LastOnException(Callback):
    """On Ctrl-C or an exception in training, save ``last.ckpt`` where `ModelCheckpoint` keeps its files.

    ``--ckpt_path last`` finds it. (Lightning's `OnExceptionCheckpoint` removes its file at the end of the next good
    run, so it can't share that name.)
    """

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        folders = [
            callback.dirpath
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.dirpath
        ]
        alone = trainer.world_size == 1 or getattr(exception, "raised_on_all_ranks", False)
        if not trainer.training or not folders or trainer.global_step == 0 or not alone:
            return  # nothing was learnt yet, or other ranks may never come to the collective save
        path = Path(folders[0]) / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"{type(exception).__name__}: state saved to {path}. Go on with `--ckpt_path last`.")
