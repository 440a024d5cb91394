"""The page of a run, written when `fit` or `test` is over and all other files are there."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nspo_lightning.compat.lightning import is_fast_dev_run
from nspo_lightning.report.reading import is_run, read_run
from nspo_lightning.report.tensorboard import log_result
from nspo_lightning.report.write import write_report


class ReportPage(Callback):
    """Write ``report.html`` and ``report.md`` into the run's folder after `fit` and `test`, and a fit's to TensorBoard.

    A page that can't be written is a warning: what the run has trained and measured is on the disk by then.

    Args:
        folder: Of the run; default: the logger's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # all ranks must ask together
        if stage not in ("fit", "test") or not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        for logger in trainer.loggers:
            logger.save()  # events wait in a queue else
        if not is_run(folder):
            return
        try:
            run = read_run(folder)
            page, _ = write_report(run)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and stage == "fit":
                    log_result(logger, run, trainer.global_step)
        except Exception as error:  # whatever it is, hours of training don't fail for a page
            rank_zero_warn(
                f"The report could not be written ({type(error).__name__}: {error}). All else is in {folder}; "
                f"`python -m nspo_lightning report {folder}` tries again."
            )
            return
        rank_zero_info(f"Report: {page}")
