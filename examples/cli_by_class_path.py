"""The callback in somebody else's LightningCLI, named in a config by its class path.

    python examples/cli_by_class_path.py fit -c examples/cli_by_class_path.yaml

Nothing here knows the callback: the config names it, and the datamodule has a ``calibration_dataloader()``.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(pl.LightningModule):
    """Two linear layers.

    Args:
        lr: Learning rate.
    """

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions, shape ``(batch, 8)``."""
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Data(pl.LightningDataModule):
    """Random regression; general inputs use 12 of 32 directions."""

    def train_dataloader(self) -> DataLoader:
        """Return what is learnt."""
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(256, 32, generator=generator), torch.randn(256, 8, generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=32)

    def calibration_dataloader(self) -> DataLoader:
        """Return what must not move."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(256, 12, generator=generator) @ torch.randn(12, 32, generator=generator)
        return DataLoader(TensorDataset(x), batch_size=64)


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the command line."""
    return LightningCLI(Regression, Data, args=args, save_config_callback=None, auto_configure_optimizers=False)


if __name__ == "__main__":
    main()
