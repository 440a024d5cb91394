"""How many rows the batches of loaders hold, and loaders cut to what a Trainer's limit allows, with their progress."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nspo_lightning.callbacks.end_together import SIGTERM_EXIT_CODE
from nspo_lightning.callbacks.protocols import KnowsBatchSizes
from nspo_lightning.terminal import Advance, rows_progress


class BatchRows:
    """Rows of each batch of some loaders; batches are counted where one of them can't tell.

    Args:
        loaders: What is gone through.
        batches: How many batches of each; infinity = unknown.

    Attributes:
        total: Rows (or batches) in all; None = unknown.
        unit: What is counted.
    """

    def __init__(self, loaders: Sequence[Any], batches: Sequence[float]) -> None:
        self._sizes: list[list[int]] | None = None
        if loaders and all(isinstance(loader, KnowsBatchSizes) for loader in loaders):
            sizes = [loader.batch_sizes() for loader in loaders]
            self._sizes = [s[: int(min(n, len(s)))] for s, n in zip(sizes, batches, strict=True)]
        self.unit = "batches" if self._sizes is None else "rows"
        count = float(sum(batches)) if self._sizes is None else float(sum(map(sum, self._sizes)))
        self.total = int(count) if count != float("inf") else None

    def of(self, loader: int, batch: int) -> int:
        """Return the rows of one batch; 1 where batches are counted."""
        return 1 if self._sizes is None else self._sizes[loader][batch]


def batches_of(loader: Any, limit: float, name: str) -> float:
    """Return how many batches of a loader a limit allows, as Lightning reads `limit_test_batches` and its like.

    Args:
        loader: What is gone through.
        limit: A number of batches (an int), or a share of them (a float).
        name: Of the setting.

    Raises:
        MisconfigurationException: If a share is asked for of which there is no whole batch, or of unknown many.
    """
    count = len(loader) if isinstance(loader, Sized) else float("inf")
    if isinstance(limit, int):
        return min(limit, count)
    if limit == 1.0:
        return count
    if count == float("inf"):
        raise MisconfigurationException(
            f"`{name}` is {limit}, a share of a loader without length. Give a whole number."
        )
    if limit > 0 and count > 0 and int(limit * count) == 0:
        raise MisconfigurationException(
            f"`{name}` is {limit}, which leaves none of {count} batches. Give at least {1 / count:.3g}, a whole number "
            "of batches, or 0."
        )
    return int(limit * count)


@contextmanager
def measuring(
    trainer: pl.Trainer, label: str, loaders: Sequence[Iterable[Any]], limit: float = 1.0, name: str = ""
) -> Iterator[list[Iterable[Any]]]:
    """Give loaders, cut to a limit, that show how far they are gone through; nothing if the Trainer shows no bars.

    SIGTERM ends the run between two batches; where `LastOnException` handles signals, it decides.

    Args:
        trainer: Whether bars are wanted.
        label: What is done with their rows.
        loaders: What is gone through, one after another.
        limit: The Trainer's `limit_test_batches` or its like.
        name: Of that setting.

    Yields:
        The loaders; each is gone through once.
    """
    counts = [batches_of(loader, limit, name) for loader in loaders]
    rows, visible = BatchRows(loaders, counts), trainer.progress_bar_callback is not None
    with rows_progress(label, rows.total, unit=rows.unit, visible=visible) as advance:
        yield [_counted(trainer, loader, i, counts[i], rows, advance) for i, loader in enumerate(loaders)]


def _counted(
    trainer: pl.Trainer, loader: Iterable[Any], index: int, count: float, rows: BatchRows, advance: Advance
) -> Iterator[Any]:
    cut = loader if count == float("inf") else itertools.islice(loader, int(count))
    for number, batch in enumerate(cut):
        yield batch
        advance(rows.of(index, number))
        if trainer.received_sigterm:  # as Lightning's own loops do between two batches
            raise SIGTERMException(SIGTERM_EXIT_CODE)
