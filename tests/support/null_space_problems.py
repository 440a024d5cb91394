"""Small problems for the null-space callback: adapters by shape alone (no peft), data, and a float64 referee."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nspo_lightning.callbacks import NullSpaceProjection

WIDTH, HIDDEN, OUT, PROTECTED, RANK = 32, 24, 8, 10, 4


class LoraLinear(nn.Module):
    """What peft's layer looks like from outside."""

    def __init__(self, width: int, out: int, rank: int = RANK, *, bias: bool = True) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, out, bias=bias).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        nn.init.zeros_(self.up.weight)
        self.scaling = {"default": 2.0}

    @property
    def down(self) -> nn.Linear:
        """A."""
        return cast("nn.Linear", self.lora_A["default"])

    @property
    def up(self) -> nn.Linear:
        """B."""
        return cast("nn.Linear", self.lora_B["default"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 2.0 * self.up(self.down(x))

    @property
    def update(self) -> torch.Tensor:
        """D = s B A in float64."""
        return 2.0 * self.up.weight.detach().double() @ self.down.weight.detach().double()


def general_inputs(count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(PROTECTED, WIDTH, generator=generator)
    return torch.randn(count, PROTECTED, generator=generator) @ mixing


class Net(pl.LightningModule):
    """Two adapted layers, trained on inputs that general text does not use alone."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = LoraLinear(WIDTH, HIDDEN), LoraLinear(HIDDEN, OUT)
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
        self.samples = 96
        self.batch_size = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(6)
        x = torch.randn(self.samples, WIDTH, generator=generator)
        y = torch.randn(self.samples, OUT, generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    def calibration_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(general_inputs()), batch_size=16)


def projection(**options: Any) -> NullSpaceProjection:
    """Return a callback that protects as many directions as `general_inputs` has, and keeps no file."""
    settings: dict[str, Any] = {"criterion": "rank", "threshold": PROTECTED, "cache_dir": None}
    return NullSpaceProjection(**(settings | options))


def referee(model: Net, precision: str = "32-true") -> dict[str, torch.Tensor]:
    """Return each layer's leading directions in float64, from a fresh model's own inputs (SVD of K, no Gram)."""
    inputs: dict[str, list[torch.Tensor]] = {"first": [], "second": []}
    fresh = Net()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "base_layer" in k}, strict=False)
    handles = [
        layer.register_forward_hook(lambda _, args, __, n=name: inputs[n].append(args[0].detach().double()))
        for name, layer in (("first", fresh.first), ("second", fresh.second))
    ]
    batches = list(fresh.eval().calibration_dataloader())  # made outside autocast, and shaped alike
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
        for (batch,) in batches:
            fresh(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.linalg.svd(torch.cat(k).T, full_matrices=False).U[:, :PROTECTED] for name, k in inputs.items()}


def leak(model: Net, precision: str = "32-true") -> float:
    """Return the largest ||D U_k|| / ||D||, by the referee's U_k."""
    found = []
    for name, leading in referee(model, precision).items():
        update = getattr(model, name).update
        assert float(update.norm()) > 1e-3, "nothing was learnt, so nothing is shown"
        found.append(float((update @ leading).norm() / update.norm()))
    return max(found)


def trainer(tmp_path: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 24,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
    }
    return pl.Trainer(**(settings | options), callbacks=list(callbacks))
