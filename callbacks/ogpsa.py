"""Orthogonal gradient projection for safety alignment (OGPSA, arXiv 2602.07892), from the paper's description.

A few gradients of general text span what is to be kept; the safety gradient loses its part in that span. It holds to
first order, at the weights where the gradients were taken, and for the gradient alone: what an adaptive optimizer makes
of it may move back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from nspo_lightning.callbacks.protocols import AnswersPrompts, HasTextToLearnFrom
from nspo_lightning.callbacks.text_gradients import check_takes_text, mean_gradients, rows_of, trained_by
from nspo_lightning.compat.lightning import datamodule_of

_DEPENDENT = 1e-6  # share of a gradient outside the others' span below which it adds no direction


class OGPSA(Callback):
    """Remove from each gradient its part in the span of general text's gradients.

    Every `every_n_updates` updates the gradient of the mean NLL of reference answers is taken for each skill (domain)
    of the general rows, and orthonormalised parameter by parameter. Before each optimizer step, before clipping, the
    training gradient loses what lies in the span. A run that goes on does so to the bit.

    The B of a fresh adapter is zero, and so are all gradients of its A: they say nothing of what is to be kept, and A
    would go unheld until the gradients are taken anew. So where some parameter has none, all are taken once more before
    the second update, and every `every_n_updates` from there.

    Args:
        rows: General training rows that the gradients are taken on, of all skills together.
        every_n_updates: Updates for which a set of gradients serves.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, rows: int = 200, every_n_updates: int = 30) -> None:
        if rows < 1 or every_n_updates < 1:
            raise ValueError(f"`rows` and `every_n_updates` must be at least 1, got {rows} and {every_n_updates}.")
        self.rows = rows
        self.every_n_updates = every_n_updates
        self._texts: dict[str, list[dict[str, Any]]] = {}
        self._bases: list[Tensor] = []
        self._taken = -1
        self._again = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything is measured, what has no text."""
        check_takes_text(pl_module, "OGPSA")
        self._owner(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        owner = self._owner(trainer)
        answers = pl_module.calibration_answers if isinstance(pl_module, AnswersPrompts) else None
        self._texts = by_skill(owner.reference_dataloader(self.rows, answers))

    @staticmethod
    def _owner(trainer: pl.Trainer) -> HasTextToLearnFrom:
        owner = datamodule_of(trainer)
        if not isinstance(owner, HasTextToLearnFrom):
            raise MisconfigurationException(
                "OGPSA has no general text: the datamodule has no `reference_dataloader()`. Use `AlignmentDataModule`."
            )
        return owner

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer | LightningOptimizer
    ) -> None:
        parameters = trained_by(optimizer)
        first = self._taken < 0
        if first or self._again or trainer.global_step - self._taken >= self.every_n_updates:
            self._take(pl_module, parameters, trainer.global_step)
            self._again = first and not all(map(len, self._bases))
        for parameter, basis in zip(parameters, self._bases, strict=True):
            if parameter.grad is not None:
                remove_(parameter.grad, basis.to(parameter.device))

    def _take(self, pl_module: pl.LightningModule, parameters: Sequence[nn.Parameter], step: int) -> None:
        module = check_takes_text(pl_module, "OGPSA")
        found = [
            mean_gradients(module, batches, "nll", parameters, pl_module.device)[0] for batches in self._texts.values()
        ]
        self._bases = [orthonormal([one[i] for one in found]) for i in range(len(parameters))]
        self._taken = step

    def held_bytes(self) -> int:
        """Return the bytes of the gradients."""
        return sum(basis.nbytes for basis in self._bases)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"bases": [basis.cpu() for basis in self._bases], "taken": self._taken, "again": self._again}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bases, self._taken = list(state_dict["bases"]), int(state_dict["taken"])
        self._again = bool(state_dict.get("again", False))  # earlier checkpoints lack it


def by_skill(batches: Any) -> dict[str, list[dict[str, Any]]]:
    """Sort the rows of batches by skill: skill -> parts of batches."""
    texts: dict[str, list[dict[str, Any]]] = {}
    for batch in batches:
        for skill in dict.fromkeys(batch["domain"]):
            rows = [i for i, name in enumerate(batch["domain"]) if name == skill]
            texts.setdefault(skill, []).append(rows_of(batch, rows))
    return dict(sorted(texts.items()))


def orthonormal(gradients: Sequence[Tensor]) -> Tensor:
    """Return an orthonormal basis of the span of gradients of one parameter, shape (directions, *the parameter's).

    Those that are zero, or lie in the span of the others, add nothing.
    """
    found: list[Tensor] = []
    for gradient in gradients:
        rest = gradient.detach().flatten().to(torch.float64)
        length = rest.norm()
        for _ in range(2):  # once more takes away what rounding left
            for direction in found:
                rest = rest - (direction @ rest) * direction
        if length > 0 and rest.norm() > _DEPENDENT * length:
            found.append(rest / rest.norm())
    shape = (len(found), *gradients[0].shape)
    return torch.stack(found).to(gradients[0].dtype).reshape(shape) if found else gradients[0].new_zeros(shape)


@torch.no_grad()
def remove_(gradient: Tensor, basis: Tensor) -> None:
    """Take a gradient's part in the span of a basis away, in place; see `orthonormal`."""
    flat = basis.flatten(1)
    gradient -= (flat.mT @ (flat @ gradient.flatten())).reshape(gradient.shape)
