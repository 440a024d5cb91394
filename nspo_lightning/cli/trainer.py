"""Lightning's Trainer with the jobs that LightningCLI can only offer as Trainer methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from nspo_lightning.attacks import Attack, AttackError, find_attacks
from nspo_lightning.callbacks import EndTogether, NullSpaceProjection
from nspo_lightning.compat.lightning import callbacks_of, datamodule_of
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.warmup import WarmupDataModule
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.warmup import WarmupModule

Attacks = str | list[str | Attack] | None
"""What `--attacks` takes."""


class Trainer(pl.Trainer):
    """Adds `warmup`, `calibrate`, `preview`, `tamper`, `data`, and attacks in `test` and `predict`, to Lightning's."""

    @override
    def test(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
        attacks: Attacks = None,
    ) -> Any:
        """Measure on the held-out split.

        Args:
            model: The module.
            dataloaders: What it is measured on, where there is no datamodule.
            ckpt_path: What is measured: best, last, a checkpoint, or an adapter's folder.
            verbose: Also print Lightning's table.
            datamodule: Has the held-out split.
            weights_only: How a checkpoint is read.
            attacks: Also measure under these attacks: names (`default` = all; `prefill`, `decoding`, `templates`,
                `prefill_5`, `role_play`, ...), YAML files of templates, attacks by class path. See docs/robustness.md.

        Returns:
            The metrics of each loader.
        """
        with self._under(attacks, dataloaders, datamodule):
            return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    @override
    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        attacks: Attacks = None,
    ) -> Any:
        """Write completions of the held-out split.

        Args:
            model: The module.
            dataloaders: What is answered, where there is no datamodule.
            datamodule: Has the held-out split.
            return_predictions: Also return them.
            ckpt_path: What answers: best, last, a checkpoint, or an adapter's folder.
            weights_only: How a checkpoint is read.
            attacks: Also answer under these attacks, see `test`.

        Returns:
            The completions, if asked for.
        """
        with self._under(attacks, dataloaders, datamodule):
            return super().predict(model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)

    @contextmanager
    def _under(self, attacks: Attacks, dataloaders: Any, datamodule: pl.LightningDataModule | None) -> Iterator[None]:
        """Tell a datamodule which attacks are tried, for one call.

        Raises:
            AttackError: If there is none of a name, or no datamodule that could put rows under one.
        """
        if attacks is None:
            yield
            return
        data = datamodule or datamodule_of(self)
        if dataloaders is not None or not isinstance(data, AlignmentDataModule):
            found = "dataloaders" if dataloaders is not None else type(data).__name__
            raise AttackError(
                f"`attacks` puts the rows of an AlignmentDataModule under attack, and there is none, but {found}. Give "
                "it as `datamodule`."
            )
        before, data.test_attacks = data.test_attacks, find_attacks(attacks)
        try:
            yield
        finally:
            data.test_attacks = before

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

    def tamper(
        self,
        model: GRPOModule,
        datamodule: AlignmentDataModule,
        ckpt_path: str | None = None,
        steps: int = 50,
        examples: int = 10,
        epochs: int = 5,
        batch_size: int = 8,
        lr: float = 5e-4,
        rows: int = 200,
        out: str | None = None,
    ) -> None:
        """Fine-tune the policy and its base a little, as an attacker with the weights would, and see what is left.

        Args:
            model: The module.
            datamodule: Has general rows with answers, and held-out prompts.
            ckpt_path: What is attacked: best, last, a checkpoint, or an adapter's folder.
            steps: Updates on harmless rows.
            examples: Harmful prompts with answers that comply, of the second attack.
            epochs: How often each of these is seen.
            batch_size: Rows an update.
            lr: Learning rate of the attacker, without a null space.
            rows: Held-out harmful prompts that are measured.
            out: Where the figures are written as JSON; tamper.json in the run's folder when left out.
        """
        from nspo_lightning.cli.tamper import Attacker, tamper

        attacker = Attacker(steps=steps, examples=examples, epochs=epochs, batch_size=batch_size, lr=lr, rows=rows)
        tamper(model, datamodule, self, attacker, ckpt_path=ckpt_path, out=out)

    def data(self, model: GRPOModule, datamodule: AlignmentDataModule, examples: int = 3) -> None:
        """Print what would be trained and calibrated on: counts, lengths, drops, rendered examples.

        Args:
            model: The module with the tokenizer.
            datamodule: The data to report on.
            examples: Rendered texts of each use.
        """
        from nspo_lightning.cli.data import check_examples, data_report

        check_examples(examples)
        self.strategy.connect(model)
        datamodule.trainer = self
        datamodule.setup()
        data_report(datamodule, examples=examples)
