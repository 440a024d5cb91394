"""Attacks in a test's report: which were tried, which of them the policy was trained against, and sample answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from nspo_lightning.attacks import Attack, Prefill
from nspo_lightning.callbacks.protocols import HasAttacks, TrainsOnPrefixes
from nspo_lightning.compat.lightning import datamodule_of
from nspo_lightning.evaluation.tables import markdown_table
from nspo_lightning.policy.identity import describe

ATTACK_SAMPLES = 4
"""Prompts of each attack whose answers are shown."""
_SHOWN_CHARS = 400


def attacks_of(trainer: pl.Trainer) -> list[Attack]:
    """Return the attacks that the test is under."""
    datamodule = datamodule_of(trainer)
    return list(datamodule.test_attacks or []) if isinstance(datamodule, HasAttacks) else []


def trained_attacks(trainer: pl.Trainer, module: pl.LightningModule, attacks: Sequence[Attack]) -> set[str]:
    """Name those of some attacks that the configuration trains against: the same templates, prefills by length."""
    datamodule = datamodule_of(trainer)
    trained: Sequence[Attack] = datamodule.trained_attacks if isinstance(datamodule, HasAttacks) else ()
    most = module.trained_prefix_tokens if isinstance(module, TrainsOnPrefixes) else 0
    return {
        attack.name
        for attack in attacks
        if any(attack.is_same_as(one) for one in trained)
        or (isinstance(attack, Prefill) and 1 <= attack.tokens <= most)
    }


def attack_identity(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what a result file says of the attacks; nothing without any."""
    datamodule = datamodule_of(trainer)
    if not (attacks := attacks_of(trainer)) or not isinstance(datamodule, HasAttacks):
        return {}
    return {"attacks": {attack.name: describe(attack) for attack in attacks}, "attack_rows": datamodule.attack_rows}


def show_attacks(loggers: Iterable[Logger], table: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Show the table of attacks and sample answers of base and policy as text in TensorBoard."""
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        logger.experiment.add_text("attacks", table)
        for name, rows in samples.items():
            columns = list(dict.fromkeys(column for row in rows for column in row if column != "attack"))
            cells = [[_clipped(row.get(column, "")) for column in columns] for row in rows]
            logger.experiment.add_text(f"attacks/{name}", markdown_table(columns, cells))


def _clipped(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else f"... {text[-_SHOWN_CHARS:]}"
