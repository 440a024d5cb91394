"""Whether a run was told to stop: asked between two batches of whatever takes long, and answered alike on all ranks."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nspo_lightning import ranks
from nspo_lightning.callbacks.end_together import SIGTERM_EXIT_CODE
from nspo_lightning.callbacks.protocols import HearsSignals
from nspo_lightning.compat.lightning import callbacks_of


def is_told_to_stop(trainer: pl.Trainer) -> bool:
    """Return whether a signal has come to any rank; all ranks ask together (cross-rank synchronisation)."""
    hearing = _who_hears(trainer)
    return ranks.any_rank(trainer.received_sigterm) if hearing is None else hearing.is_told_to_stop(trainer)


def stop_if_told(trainer: pl.Trainer) -> None:
    """End the run if a signal has come to any rank; all ranks ask together (cross-rank synchronisation).

    Where no callback handles signals (`LastOnException` does), Lightning notes SIGTERM alone.

    Raises:
        SIGTERMException: Or KeyboardInterrupt, as the signal was.
    """
    hearing = _who_hears(trainer)
    if hearing is not None:
        hearing.stop_if_told(trainer)
    elif ranks.any_rank(trainer.received_sigterm):
        raise SIGTERMException(SIGTERM_EXIT_CODE)


def _who_hears(trainer: pl.Trainer) -> HearsSignals | None:
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, HearsSignals)), None)
