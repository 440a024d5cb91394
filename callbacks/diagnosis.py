"""Say what to look at in a run: on the way as warnings, at its end as one block, worst first, and in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from nspo_lightning.atomic import write_json
from nspo_lightning.callbacks.protocols import FailsAgain, TellsMeasured, TellsNullSpace, TellsTraining
from nspo_lightning.compat.lightning import callbacks_of, is_fast_dev_run
from nspo_lightning.evaluation.diagnosis import Finding, NullSpaceFacts, RunFacts, diagnose
from nspo_lightning.evaluation.tables import findings_text

DIAGNOSIS = "diagnosis.json"
FIRST_LOOK = 8
"""Training steps after which it is first looked at how it goes; then after twice as many, and so on."""
TOLD_BY_OTHERS = ("No group had a signal", "All rewards are the same", "Updates that were not finite")
"""Findings that the module warns of as they come up."""


class Diagnosis(Callback):
    """Write ``diagnosis.json`` into the run's folder and print its findings as one block, "What to look at".

    What is wrong already is warned of on the way, once each: after the first step what the null space leaves, then
    after 8, 16, 32, ... steps how training goes. A run that went as it should has an empty list. Stands behind
    `RunReport`, whose figures it looks at too.

    Args:
        folder: Where to write; default: the logger's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        self._folder = Path()
        self._steps = 0
        self._told: set[str] = set()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps, self._told = 0, set()
        self._folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # all ranks must ask together

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        begun = self._steps >= FIRST_LOOK and self._steps & (self._steps - 1) == 0
        if self._steps != 1 and not begun:
            return
        facts = facts_of(trainer, pl_module) if begun else RunFacts(null_space=_null_space(trainer))
        for finding in diagnose(facts):
            if finding.severity != "note" and finding.title not in (*TOLD_BY_OTHERS, *self._told):
                self._told.add(finding.title)
                rank_zero_warn(f"{finding.title}. {finding.text} {finding.cure}")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_fast_dev_run(trainer) or not self._steps:
            return
        self._conclude(trainer, facts_of(trainer, pl_module), show=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._steps and isinstance(exception, FailsAgain) and isinstance(pl_module, TellsTraining):
            # Its message says what was wrong, and the file says it too. Ranks need not be here together.
            self._conclude(trainer, RunFacts(training=pl_module.training_facts()), show=False)

    def _conclude(self, trainer: pl.Trainer, facts: RunFacts, *, show: bool) -> None:
        self.findings, self._steps = diagnose(facts), 0
        if not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json([finding.as_dict() for finding in self.findings], self._folder / DIAGNOSIS)
        if show and self.findings:
            from rich import get_console

            get_console().print(findings_text(self.findings), highlight=False)


def facts_of(trainer: pl.Trainer, module: pl.LightningModule) -> RunFacts:
    """Return what is known of a run: by its module, its null space, and whoever measured it."""
    measured = next((one for one in callbacks_of(trainer) if isinstance(one, TellsMeasured)), None)
    return RunFacts(
        training=module.training_facts() if isinstance(module, TellsTraining) else None,
        null_space=_null_space(trainer),
        before={} if measured is None else measured.before,
        after={} if measured is None else measured.after,
        intervals={} if measured is None else measured.intervals["after"],
    )


def _null_space(trainer: pl.Trainer) -> NullSpaceFacts | None:
    found = (one.null_space_facts() for one in callbacks_of(trainer) if isinstance(one, TellsNullSpace))
    return next((facts for facts in found if facts is not None), None)
