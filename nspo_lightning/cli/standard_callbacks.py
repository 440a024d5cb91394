"""The callbacks that every run of the command line has, unless its configuration brings one of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.utilities import rank_zero_info

from nspo_lightning.callbacks import (
    Diagnosis,
    EndTogether,
    ExactResume,
    GeneralText,
    LastCheckpoint,
    LastOnException,
    PredictionWriter,
    RunProgress,
    RunReport,
    SampleCompletions,
    TestReport,
)
from nspo_lightning.report.callback import ReportPage


def with_standard_callbacks(given: Sequence[Callback], *, checkpoints: bool, progress_bar: bool) -> list[Callback]:
    """Add what a run should not miss.

    Args:
        given: The configuration's callbacks.
        checkpoints: Whether the Trainer writes any.
        progress_bar: Whether it shows one.

    Returns:
        All callbacks. The one that writes `last` comes last: its file then holds what the others decided.
    """
    # GeneralText comes before ExactResume, which then still calls it a validation: a signal ends the measuring at once,
    # and the run that goes on validates anew.
    standard: list[Callback] = [GeneralText()]
    standard += [LastCheckpoint(), ExactResume(), LastOnException()] if checkpoints else []
    # EndTogether comes after LastOnException: other processes are ended once the checkpoint is written.
    standard += [EndTogether(), SampleCompletions(), PredictionWriter(), RunReport(), TestReport()]
    standard += [Diagnosis(), ReportPage()]  # behind RunReport, whose figures they look at
    if progress_bar:
        standard.append(RunProgress())
    callbacks = list(given)
    for callback in standard:
        kind = ProgressBar if isinstance(callback, ProgressBar) else type(callback)
        if not any(isinstance(other, kind) for other in callbacks):
            callbacks.append(callback)
    return sorted(callbacks, key=lambda callback: isinstance(callback, LastCheckpoint))


NOT_BAREBONES = (Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelSummary, ProgressBar)
"""Callbacks that need what `trainer.barebones` turns off: files, logged metrics, a screen."""


def without_extras(given: Sequence[Callback]) -> list[Callback]:
    """Leave out, and name, what a `barebones` Trainer refuses."""
    left_out = sorted({type(callback).__name__ for callback in given if isinstance(callback, NOT_BAREBONES)})
    if left_out:
        rank_zero_info(f"`trainer.barebones` leaves out {', '.join(left_out)}: nothing is logged or saved on the way.")
    return [callback for callback in given if not isinstance(callback, NOT_BAREBONES)]
