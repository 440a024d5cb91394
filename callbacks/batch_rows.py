"""How many rows the batches of loaders hold, and loaders cut to what a Trainer's limit allows, with their progress."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nspo_lightning import ranks
from nspo_lightning.callbacks.protocols import KnowsBatchSizes
from nspo_lightning.callbacks.stopping import stop_if_told
from nspo_lightning.terminal import rows_progress


class BatchRows:
    """Rows of each batch of some loaders; batches are counted where one of them can't tell.

    Args:
        loaders: The loaders to go through.
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
        self.unit = "batch" if self._sizes is None else "row"
        count = float(sum(batches)) if self._sizes is None else float(sum(map(sum, self._sizes)))
        self.total = int(count) if count != float("inf") else None

    def of(self, loader: int, batch: int) -> int:
        """Return the rows of one batch; 1 where batches are counted."""
        return 1 if self._sizes is None else self._sizes[loader][batch]


def batches_of(loader: Any, limit: float, name: str) -> float:
    """Return how many batches of a loader a limit allows, as Lightning reads `limit_test_batches` and its like.

    Args:
        loader: The loader to go through.
        limit: A number of batches (an int), or a share of them (a float).
        name: Name of the setting.

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
    trainer: pl.Trainer,
    label: str,
    loaders: Sequence[Iterable[Any]],
    limit: float = 1.0,
    name: str = "",
    ask: Callable[[pl.Trainer], None] = stop_if_told,
) -> Iterator[list[Iterable[Any]]]:
    """Give loaders, cut to a limit, that show how far they are gone through; nothing if the Trainer shows no bars.

    A signal ends the run after the batch at hand, on all ranks together; they may have different numbers of batches.

    Args:
        trainer: Whether bars are wanted.
        label: What is done with their rows.
        loaders: What is gone through, one after another.
        limit: The Trainer's `limit_test_batches` or its like.
        name: Name of that setting.
        ask: What is asked first and after each batch; by default whether the run is told to stop. All ranks ask
            together.

    Yields:
        The loaders; each is gone through once, to its end.
    """
    ask(trainer)
    counts = [batches_of(loader, limit, name) for loader in loaders]
    rows, visible = BatchRows(loaders, counts), trainer.progress_bar_callback is not None
    turns = [max(of_ranks) for of_ranks in zip(*ranks.gather_objects(counts), strict=True)]
    with rows_progress(label, rows.total, unit=rows.unit, visible=visible) as advance:

        def passed(index: int, number: int) -> None:
            advance(rows.of(index, number))

        yield [
            _counted(loader, counts[i], turns[i], partial(passed, i), partial(ask, trainer))
            for i, loader in enumerate(loaders)
        ]


def _counted(
    loader: Iterable[Any], count: float, turns: float, passed: Callable[[int], None], ask: Callable[[], None]
) -> Iterator[Any]:
    """Give `count` batches of a rank at most; ask `turns` times, as often as all ranks do, never if that is unknown."""
    asks = turns < float("inf") or ranks.world_size() == 1
    number = -1
    for number, batch in enumerate(loader if count == float("inf") else itertools.islice(loader, int(count))):
        yield batch
        passed(number)
        if asks:
            ask()
    if asks and ranks.world_size() > 1:
        for _ in range(number + 1, int(turns)):
            ask()
