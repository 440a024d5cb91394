"""A model whose batches take different routes through its layers, and its text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nspo_lightning.nullspace import BasisSettings, Calibration, ForwardCall, calibrate_modules

WIDTH = 32
SETTINGS = BasisSettings(criterion="rank", threshold=6)
PLANS_OF_RANKS = [[("a", 0), ("b", 0)], [("b", 1), ("c", 1), ("a", 2)], [("a", 0), ("b", 0)], [("c", 0), ("d", 2)]]
"""Of four batches: two ranks take turns."""


class Routes(nn.Module):
    """Runs its layers by a plan: (layer, number of the tensor that it is given), in that order.

    Records what each layer was given.
    """

    def __init__(self, names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, 2) for name in names})
        self.given: dict[str, list[Tensor]] = {}
        self.batches = 0

    def forward(self, tensors: list[Tensor], plan: list[tuple[str, int]]) -> None:
        self.batches += 1
        for name, number in plan:
            self.given.setdefault(name, []).append(tensors[number])
            self.layers[name](tensors[number])


def calls_of(plans: list[list[tuple[str, int]]]) -> list[ForwardCall]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -3, WIDTH)
    turns = [torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(3)]
    return [
        ForwardCall(args=([(torch.randn(40, WIDTH, generator=generator) * scale) @ turn for turn in turns], plan))
        for plan in plans
    ]


def calibrated(
    model: Routes, calls: list[ForwardCall], budget: float | None = None, *, sharded: bool = False
) -> Calibration:
    """Calibrate all layers; the budget is in GB."""
    layers = dict(model.layers.items())
    return calibrate_modules(layers, model, lambda: iter(calls), SETTINGS, memory_budget_gb=budget, sharded=sharded)
