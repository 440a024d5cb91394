"""One line on what is trained, in place of Lightning's table of modules."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning.terminal import counted


class TrainedParameters(Callback):
    """Say how many parameters are trained. `--trainer.enable_model_summary true` shows Lightning's table instead."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        rank_zero_info(
            f"Training {counted(sum(p.numel() for p in trained), 'parameter')} in "
            f"{counted(len(trained), 'matrix', 'matrices')}."
        )
