"""A state to go back to: trained weights and optimizer state in memory, and a learning rate that gets smaller."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from nspo_lightning.callbacks.protocols import GoesBack
from nspo_lightning.compat.torch import scale_scheduler_

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last two are OneCycleLR's


class LastGood:
    """Trained weights and optimizer state as they were after update `step` (-1 = never taken).

    Costs the trained parameters and the optimizer's moments once more, on their own devices.
    """

    def __init__(self) -> None:
        self.step = -1
        self._updates = 0
        self._weights: dict[str, Tensor] = {}
        self._optimizers: list[dict[Any, Any]] = []

    @torch.no_grad()
    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the present state."""
        self.step = trainer.global_step
        self._updates = pl_module.updates if isinstance(pl_module, GoesBack) else self.step
        self._weights = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self._optimizers = [deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]

    @torch.no_grad()
    def put_back_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore weights and optimizer state; learning rates stay as they are, gradients are dropped.

        A module that `GoesBack` is told.
        """
        for name, parameter in pl_module.named_parameters():
            if name in self._weights:
                parameter.copy_(self._weights[name].to(parameter.device))
                parameter.grad = None
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": deepcopy(state)})
        if isinstance(pl_module, GoesBack):
            pl_module.go_back(self._updates)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "step": self.step,
            "updates": self._updates,
            "weights": self._weights,
            "optimizers": self._optimizers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.step = int(state_dict["step"])
        self._updates = int(state_dict.get("updates", self.step))  # earlier checkpoints hold the steps alone
        self._weights, self._optimizers = dict(state_dict["weights"]), list(state_dict["optimizers"])


def scale_learning_rates_(trainer: pl.Trainer, factor: float) -> None:
    """Multiply every learning rate, and what schedulers make later ones from."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for key in _RATES:
                if key in group:
                    group[key] = group[key] * factor
    for config in trainer.lr_scheduler_configs:
        scale_scheduler_(config.scheduler, factor)
