"""Lightning's Trainer with the jobs that LightningCLI can only offer as Trainer methods."""

from __future__ import annotations

import lightning.pytorch as pl

from nspo_lightning.callbacks import EndTogether, NullSpaceProjection
from nspo_lightning.compat.lightning import callbacks_of
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.warmup import WarmupDataModule
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.warmup import WarmupModule


class Trainer(pl.Trainer):
    """Adds `warmup`, `calibrate`, `preview` and `data` to Lightning's Trainer."""

    def warmup(self, model: WarmupModule, datamodule: WarmupDataModule, ckpt_path: str | None = None) -> None:
        """Teach a few refusals inside the null space, for `fit` to go on from.

        Args:
            model: The module.
            datamodule: What is taught, and what is looked at.
            ckpt_path: Checkpoint of a warm start to go on with; last = that of the run.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def calibrate(
        self,
        model: GRPOModule,
        datamodule: AlignmentDataModule,
        out: str = "basis.safetensors",
        keep_moments: bool | None = None,
    ) -> None:
        """Find the null space of general text and write it to a file that `--nullspace.calibration` takes.

        Args:
            model: The module with the policy.
            datamodule: Has the calibration text.
            out: The basis file; a picture of the spectrum is written beside it.
            keep_moments: Keep the second moments by domain in the file; null = if they take less than 256 MB.
        """
        from nspo_lightning.cli.calibrate import calibrate

        projection = next((c for c in callbacks_of(self) if isinstance(c, NullSpaceProjection)), None)

        def job() -> None:
            calibrate(model, datamodule, out=out, projection=projection, keep_moments=keep_moments, trainer=self)

        self.strategy.connect(model)
        launcher = self.strategy.launcher  # starts the other processes, as it does for `fit`
        if launcher is None:
            job()
        else:
            try:
                launcher.launch(job, trainer=self)
            except BaseException as error:
                EndTogether().on_exception(self, model, error)
                raise

    def preview(
        self,
        model: GRPOModule,
        datamodule: AlignmentDataModule,
        prompts: int = 64,
        output: str | None = None,
        examples: int = 3,
    ) -> None:
        """Answer training prompts and score the answers, without training: `judge -c CONFIG --preview 64`.

        Args:
            model: The module.
            datamodule: Has the prompts.
            prompts: How many, in the order of training.
            output: JSON lines file for all answers; null = none is written.
            examples: Prompts that are shown with their best and worst answer.
        """
        from nspo_lightning.cli.preview import preview

        preview(model, datamodule, self, prompts=prompts, output=output, examples=examples)

    def data(self, model: GRPOModule, datamodule: AlignmentDataModule, examples: int = 3) -> None:
        """Print what would be trained and calibrated on: counts, lengths, drops, rendered examples.

        Args:
            model: The module with the tokenizer.
            datamodule: What is reported on.
            examples: Rendered texts of each use.
        """
        from nspo_lightning.cli.data import data_report

        self.strategy.connect(model)
        datamodule.trainer = self
        datamodule.setup()
        data_report(datamodule, examples=examples)
