"""What is used of LightningCLI's private parts. There is no public hook between parsing and `_parse_ckpt_path`."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI
from typing_extensions import override


class CLIWithoutStoredSettings(LightningCLI):
    """LightningCLI that takes no settings out of a checkpoint, and calls `after_parsing` instead.

    Lightning loads the file there to look for hyperparameters. Ours stand in config.yaml, and the file may be no
    checkpoint at all.
    """

    @override
    def _parse_ckpt_path(self) -> None:
        self.after_parsing()

    def after_parsing(self) -> None:
        """Look at `config` before anything is instantiated."""
