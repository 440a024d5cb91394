"""A pull back to the base on general text: the penalty that a null space is to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from nspo_lightning.callbacks.protocols import (
    KeepsBaseStates,
    LearnsFromText,
)
from nspo_lightning.callbacks.pull_text import (
    check_coefficient,
    check_pull,
    check_start_weight,
    text_to_pull_by,
    together,
)
from nspo_lightning.callbacks.text_gradients import add_pull_, mean_gradients, trained_by


class GeneralKL(Callback):
    """Add `coefficient` times KL(base || policy) on general text to the loss of every update.

    The text is what a null space would be computed from, all real tokens of it, its rows taken in turn. The term's
    gradient is added before each optimizer step, before clipping, one batch's graph at a time; a run that goes on does
    so to the bit. Updates that are skipped for want of a signal pull nowhere either. Logs `general_kl/train`, nats a
    token.

    Whether to answer or to refuse is decided in an answer's first tokens, one position in a hundred of the text. With
    `start_weight` they have that share of the mean, as in the criterion `contrast`: (1 - w) times the mean over the
    text plus w times the mean over the starts of the base's own answers to further general prompts (the datamodule's
    `calibration_starts`), as many rows of them.

    Args:
        coefficient: Of the KL, in units of the loss for a nat a token.
        rows: Calibration rows an update, rounded up to whole batches; and as many starts of answers.
        start_weight: Share of the starts of answers in the mean, from 0 to 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, coefficient: float = 1.0, rows: int = 64, start_weight: float = 0.0) -> None:
        check_coefficient(coefficient)
        check_start_weight(start_weight)
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {rows}.")
        self.coefficient = coefficient
        self.rows = rows
        self.start_weight = start_weight
        self.kl: float | None = None
        """On the rows of the last update; None before the first."""
        self._batches: list[Any] = []
        self._starts: list[Any] = []
        self._states_bytes = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything is measured, what has no base or no text."""
        check_pull(trainer, pl_module, "GeneralKL", self.start_weight)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches, self._starts = text_to_pull_by(trainer, pl_module, "GeneralKL", self.start_weight)

    def batches_of(self, update: int) -> list[Any]:
        """List the batches of an update: the calibration text in turn, and again from its beginning."""
        return in_turn(self._batches, -(-self.rows // len(self._batches[0]["input_ids"])), update)

    def starts_of(self, update: int) -> list[Any]:
        """List an update's batches of starts of answers, likewise; `labels_mask` is 1 at what is scored."""
        return together(in_turn(self._starts, self.rows, update))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer | LightningOptimizer
    ) -> None:
        assert isinstance(pl_module, LearnsFromText)  # `on_fit_start` has looked
        parameters = trained_by(optimizer)
        self.kl, before = 0.0, _states_of(pl_module)
        for batches_of, share in (
            (self.batches_of, 1 - self.start_weight),
            (self.starts_of, self.start_weight),
        ):
            if not share:
                continue
            batches = batches_of(trainer.global_step)
            gradients, kl = mean_gradients(pl_module, batches, "kl", parameters, pl_module.device)
            self.kl += share * kl
            for parameter, gradient in zip(parameters, gradients, strict=True):
                add_pull_(parameter, gradient, self.coefficient * share)
        self._states_bytes += _states_of(pl_module) - before
        pl_module.log("general_kl/train", self.kl, on_step=True, on_epoch=False, batch_size=1)

    def held_bytes(self) -> int:
        """Return the bytes of the text, and of the base's hidden states of it that the module keeps."""
        parts = (part for batch in (*self._batches, *self._starts) for part in batch.values())
        return sum(part.nbytes for part in parts if isinstance(part, Tensor)) + self._states_bytes


def _states_of(module: pl.LightningModule) -> int:
    return module.base_states_bytes if isinstance(module, KeepsBaseStates) else 0


def in_turn(items: Sequence[Any], count: int, update: int) -> list[Any]:
    """List `count` items of an update; all are taken in turn, none twice in one update."""
    count = min(count, len(items))
    return [items[(update * count + i) % len(items)] for i in range(count)]
