"""A pull back to the base on general text: the penalty that a null space is to be compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from typing_extensions import override

from nspo_lightning.callbacks.null_space.basis_source import general_batches
from nspo_lightning.callbacks.protocols import (
    CountsCalibrationStarts,
    HasCalibrationText,
    KeepsBaseStates,
    LearnsFromText,
)
from nspo_lightning.callbacks.text_gradients import check_takes_text, mean_gradients, rows_of, trained_by
from nspo_lightning.compat.lightning import datamodule_of
from nspo_lightning.nullspace.domains import are_starts, is_apart
from nspo_lightning.nullspace.modes import adapted_models

_TOGETHER = 8
"""Starts in one forward pass."""


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
        if not (coefficient > 0 and math.isfinite(coefficient)) or rows < 1:
            raise ValueError(
                f"`coefficient` must be positive and `rows` at least 1, got {coefficient} and {rows}. To train without "
                "the penalty, leave the callback out."
            )
        if not 0 <= start_weight <= 1:
            raise ValueError(f"`start_weight` must be a share in [0, 1], got {start_weight}. 0.5 is a good start.")
        self.coefficient = coefficient
        self.rows = rows
        self.start_weight = start_weight
        self.kl: float | None = None
        """On the rows of the last update; None before the first."""
        self._batches: list[Any] = []
        self._starts: list[Any] = []
        self._logged = True
        self._states_bytes = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything is measured, what has no base or no text."""
        check_takes_text(pl_module, "GeneralKL")
        if not adapted_models(pl_module):
            raise MisconfigurationException(
                "GeneralKL pulls to the policy with its adapter off, and there is no adapter (`policy.lora: null`). "
                "Train an adapter, or leave the callback out."
            )
        owner = datamodule_of(trainer)
        if not isinstance(owner, HasCalibrationText):
            raise MisconfigurationException(
                "GeneralKL has no general text: the datamodule has no `calibration_dataloader()`. Use "
                "`AlignmentDataModule`, or add that method."
            )
        if self.start_weight and isinstance(owner, CountsCalibrationStarts):
            self._check_starts(owner.count_calibration_starts())

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = general_batches(datamodule_of(trainer), pl_module, trainer, starts=self.start_weight > 0)
        self._batches, self._starts = split_starts(batches)
        if not self._batches:
            raise MisconfigurationException("GeneralKL has no general text: `calibration_dataloader()` gives none.")
        self._check_starts(len(self._starts))

    def _check_starts(self, count: int) -> None:
        if self.start_weight and not count:
            raise MisconfigurationException(
                f"GeneralKL's `start_weight` is {self.start_weight:g}, and the calibration text has no starts of "
                "answers: they are of general training rows that are not calibrated on. With `AlignmentDataModule` "
                "give `data.calibration_starts` above 0 and a `data.calibration_size` that leaves rows for them, or "
                "more rows in `data.general`; or leave `start_weight` out."
            )

    def batches_of(self, update: int) -> list[Any]:
        """List the batches of an update: the calibration text in turn, and again from its beginning."""
        return in_turn(self._batches, -(-self.rows // len(self._batches[0]["input_ids"])), update)

    def starts_of(self, update: int) -> list[Any]:
        """List an update's batches of starts of answers, likewise; `labels_mask` is 1 at what is scored."""
        return _together(in_turn(self._starts, self.rows, update))

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
                pull = gradient.mul_(self.coefficient * share)
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        self._states_bytes += _states_of(pl_module) - before
        self._logged = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._logged and self.kl is not None:
            pl_module.log("general_kl/train", self.kl, on_step=True, on_epoch=False, batch_size=1)
        self._logged = True

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


def split_starts(batches: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the batches of text, and one row each the starts of answers among them.

    The starts come in an order that is random and always the same (the datamodule has them by length), with a
    `labels_mask` that is 1 at the first `START_TOKENS` tokens of the answer, shape (tokens,), without padding.
    """
    text: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    for batch in batches:
        names = batch.get("domain", "")  # one for the batch, or one a row
        known = [names] * len(batch["input_ids"]) if isinstance(names, str) else names
        if plain := [n for n, domain in enumerate(known) if not is_apart(domain)]:
            text.append(rows_of(batch, plain))
        starts += [_start(batch, n) for n, domain in enumerate(known) if are_starts(domain)]
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0)).tolist()
    return text, [starts[n] for n in order]


def _start(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    real = batch["attention_mask"][row].bool()
    labels = torch.nn.functional.pad(batch["answer_starts"][row][real][:-1], (1, 0))
    return {"input_ids": batch["input_ids"][row][real], "labels_mask": labels}


def _together(rows: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return rows in batches of `_TOGETHER`, shortest first, padded on the right."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = []
    for start in range(0, len(ordered), _TOGETHER):
        part = ordered[start : start + _TOGETHER]
        ids, labels = (pad_sequence([row[k] for row in part], batch_first=True) for k in ("input_ids", "labels_mask"))
        mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in part], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels_mask": labels.long()})
    return batches
