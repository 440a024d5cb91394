"""The general text that a policy is pulled back to its base by, and what a pull asks of module and datamodule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nspo_lightning.callbacks.null_space.basis_source import general_batches
from nspo_lightning.callbacks.protocols import CountsCalibrationStarts, HasCalibrationText
from nspo_lightning.callbacks.text_gradients import check_takes_text, rows_of
from nspo_lightning.compat.lightning import datamodule_of
from nspo_lightning.nullspace.domains import are_starts, is_apart
from nspo_lightning.nullspace.modes import adapted_models

_TOGETHER = 8
"""Starts in one forward pass."""


def check_coefficient(coefficient: float) -> None:
    """Raise ValueError for what is no strength of a pull."""
    if not (coefficient > 0 and math.isfinite(coefficient)):
        raise ValueError(
            f"`coefficient` must be positive, got {coefficient}. To train without the penalty, leave the callback out."
        )


def check_start_weight(start_weight: float) -> None:
    """Raise ValueError for what is no share."""
    if not 0 <= start_weight <= 1:
        raise ValueError(f"`start_weight` must be a share in [0, 1], got {start_weight}. 0.5 is a good start.")


def check_pull(trainer: pl.Trainer, module: pl.LightningModule, name: str, start_weight: float) -> None:
    """Refuse, before anything is measured, what has no base or no text.

    Args:
        trainer: The run's.
        module: What is trained.
        name: The callback's.
        start_weight: Share of the starts of answers.

    Raises:
        MisconfigurationException: With what is missing, and the way out.
    """
    check_takes_text(module, name)
    if not adapted_models(module):
        raise MisconfigurationException(
            f"{name} pulls to the policy with its adapter off, and there is no adapter (`policy.lora: null`). "
            "Train an adapter, or leave the callback out."
        )
    owner = datamodule_of(trainer)
    if not isinstance(owner, HasCalibrationText):
        raise MisconfigurationException(
            f"{name} has no general text: the datamodule has no `calibration_dataloader()`. Use "
            "`AlignmentDataModule`, or add that method."
        )
    if isinstance(owner, CountsCalibrationStarts):
        _check_starts(name, start_weight, owner.count_calibration_starts())


def text_to_pull_by(
    trainer: pl.Trainer, module: pl.LightningModule, name: str, start_weight: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the batches of calibration text, and the starts of answers, see `split_starts`; see `check_pull`.

    Raises:
        MisconfigurationException: If there is none.
    """
    batches = general_batches(datamodule_of(trainer), module, trainer, starts=start_weight > 0)
    text, starts = split_starts(batches)
    starts = [start for start in starts if start["labels_mask"].any()]  # an answer may end before it begins
    if not text:
        raise MisconfigurationException(f"{name} has no general text: `calibration_dataloader()` gives none.")
    _check_starts(name, start_weight, len(starts))
    return text, starts


def _check_starts(name: str, start_weight: float, count: int) -> None:
    if start_weight and not count:
        raise MisconfigurationException(
            f"{name}'s `start_weight` is {start_weight:g}, and the calibration text has no starts of answers: they are "
            "of general training rows that are not calibrated on. With `AlignmentDataModule` give "
            "`data.calibration_starts` above 0 and a `data.calibration_size` that leaves rows for them, or more rows "
            "in `data.general`; or leave `start_weight` out."
        )


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


def together(rows: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return rows in batches of `_TOGETHER`, shortest first, padded on the right."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = []
    for start in range(0, len(ordered), _TOGETHER):
        part = ordered[start : start + _TOGETHER]
        ids, labels = (pad_sequence([row[k] for row in part], batch_first=True) for k in ("input_ids", "labels_mask"))
        mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in part], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels_mask": labels.long()})
    return batches
