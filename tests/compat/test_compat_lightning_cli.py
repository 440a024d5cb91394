"""LightningCLI still calls the method that we replace, before it instantiates anything."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from nspo_lightning.compat.lightning_cli import CLIWithoutStoredSettings


def test_no_settings_are_read_from_a_checkpoint_and_the_hook_comes_first(tmp_path: Path) -> None:
    assert callable(getattr(LightningCLI, "_parse_ckpt_path", None)), (
        "LightningCLI._parse_ckpt_path is gone: see in LightningCLI.__init__ where hyperparameters of a checkpoint are "
        "read now, and override that in nspo_lightning/compat/lightning_cli.py"
    )
    torch.save({"hyper_parameters": {"nothing": 1}}, tmp_path / "a.ckpt")
    seen: list[tuple[str, bool]] = []

    class Probe(CLIWithoutStoredSettings):
        def after_parsing(self) -> None:
            seen.append((self.config[self.config.subcommand].ckpt_path, hasattr(self, "model")))

        def fit(self, **_: object) -> None:
            """Train nothing."""

    Probe(BoringModel, BoringDataModule, args=["fit", f"--ckpt_path={tmp_path / 'a.ckpt'}"], save_config_callback=None)
    assert seen == [(str(tmp_path / "a.ckpt"), False)]
