"""TensorBoard's side of a run: tags in an order to read, and the result as text and among HParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from nspo_lightning.evaluation.tables import markdown_blocks
from nspo_lightning.report import words
from nspo_lightning.report.markdown import measures_table
from nspo_lightning.report.records import Run
from nspo_lightning.report.tags import RESULT, shown_as

_EACH = 4
"""Answers of each kind."""


class RunLogger(TensorBoardLogger):
    """Lightning's logger, with tags in the order of `shown_as`."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics({shown_as(name): value for name, value in metrics.items()}, step)


def log_result(logger: TensorBoardLogger, run: Run, step: int) -> None:
    """Write before and after as text, some answers, and a fit's settings and result as HParams."""
    measured = run.measured
    if measured is not None:
        table = f"{words.headline(run)}\n\n{measures_table(measured.measures)}"
        logger.experiment.add_text("before and after", table, step)
    if run.answers is not None:
        logger.experiment.add_text("answers before and after", markdown_blocks(_said(run)), step)
    fitted = next((m for m in run.measurements if m.job == "fit"), None)
    if fitted is not None and run.hparams and fitted.measures:
        result = {f"{RESULT}/{m.name}": m.after.value for m in fitted.measures if m.after is not None}
        if run.leak is not None:
            result[f"{RESULT}/leak"] = run.leak
        logger.log_hyperparams(dict(run.hparams), result, step)


def _said(run: Run) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for kind in words.KINDS:
        for e in [e for e in run.answers.shown if e.kind == kind][:_EACH] if run.answers is not None else []:
            row: dict[str, object] = {"prompt": e.prompt, "kind": words.KINDS[kind]}
            for when, answer in (("before", e.before), ("after", e.after)):
                if answer is not None:
                    row |= {when: answer.text, f"outcome {when}": answer.outcome}
            rows.append(row)
    return rows
