"""A loader whose place can be saved: after a resume the next batch is the one that would have come.

It is no `torch.utils.data.DataLoader`. Tokenising a few prompts needs no worker processes, and Lightning would put its
own sampler into a DataLoader under DDP, which doubles rows to make ranks even.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.order import (
    Stop,
    batch_count,
    epoch_order,
    mixture_sizes,
    rank_batches,
    repeated_index,
)
from nspo_lightning.datamodules.sources.rows import PromptRow

_STATE_MEANINGS = {
    "rows": "the training rows",
    "batch_size": "`batch_size`",
    "world_size": "the number of devices",
    "repeat_batches": "`repeat_batches`",
    "window": "`trainer.accumulate_grad_batches`",
    "seed": "the data seed",
}


FOLLOWING = "following"
"""In a batch: the one that follows, if it comes for the first time."""


@dataclass
class Place:
    """Where a loader stands.

    Attributes:
        epoch: The epoch, from 0.
        start: The first batch that the next iteration gives.
        given: The batches of this epoch that were handed out.
        taken: With `on_demand`, rows of all ranks that were taken so far, over all epochs.
        starts: Likewise, what had been taken before each batch of the block at hand.
    """

    epoch: int = 0
    start: int = 0
    given: int = 0
    taken: int = 0
    starts: list[int] = field(default_factory=list)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; a place that was restored in that same epoch stays."""
        if epoch != self.epoch:
            self.epoch, self.start, self.given = epoch, 0, 0


class PromptLoader:
    """Batches of rows, sharded over ranks, in an order that depends on seed and epoch alone.

    Args:
        sources: The rows of each source.
        collate: Makes a batch of rows.
        batch_size: Rows a batch and rank.
        weights: Shares of the sources; equal when None.
        stop: When an epoch of a mixture ends, see `mixture_sizes`.
        shuffle: Whether epochs are shuffled; if not, an epoch is every row once, in order.
        seed: Decides the order.
        repeat_batches: How often each batch is given.
        window: Gives the number of batches that make one update. Repeated batches come in blocks of so many, A B A B
            for two, such that each pass over a block is an update of its own, and hold their number in all epochs as
            `batch_number`. The last block of an epoch is filled up with batches that hold nothing but an empty
            `prompt`.
        shard: Gives (rank, number of ranks).
        unfinished: Gives the number of batches that were handed out but not yet trained on, when state is saved.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[PromptRow]],
        collate: Callable[[list[PromptRow]], dict[str, Any]],
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        stop: Stop = "shortest",
        shuffle: bool = False,
        seed: int = 0,
        repeat_batches: int = 1,
        window: Callable[[], int] = lambda: 1,
        shard: Callable[[], tuple[int, int]] = lambda: (0, 1),
        unfinished: Callable[[], int] = lambda: 0,
    ) -> None:
        self.rows = [row for source in sources for row in source]
        self.place = Place()
        # Lightning calls `loader.batch_sampler.sampler.set_epoch`. A `sampler` of our own would make it look for more.
        self.batch_sampler = SimpleNamespace(sampler=self.place)
        self.batch_size = batch_size
        self._sizes = [len(source) for source in sources]
        self._weights = list(weights) if weights is not None else [1.0] * len(sources)
        self._collate = collate
        self._stop = stop
        self._shuffle = shuffle
        self._seed = seed
        self.repeat_batches = repeat_batches
        self.look_ahead = False
        """Whether batches hold the one that follows, as `FOLLOWING`."""
        self.on_demand = False
        """Whether rows are taken one behind the other from all epochs' orders laid end to end, and `more` takes further
        ones in between. An epoch has as many batches as without, all full as far as there are rows, and may go through
        the rows several times; none comes twice in one pass over them, nor twice in a batch: what a batch took in one
        pass, it passes over in the next."""
        self._window = window
        self._shard = shard
        self._unfinished = unfinished
        self._known_order: tuple[int, Sequence[int]] = (-1, [])
        self._held: dict[int, int] = {}  # rows of the batch at hand, on all ranks, and in which pass it took them

    @property
    def _visited(self) -> list[int]:
        """Rows of each source in an epoch."""
        return mixture_sizes(self._sizes, self._weights, self._stop) if self._shuffle else self._sizes

    def __len__(self) -> int:
        """Count the batches of an epoch on each rank, repetitions included."""
        return self._positions(batch_count(sum(self._visited), self.batch_size, self._shard()[1]))

    @property
    def window(self) -> int:
        """Batches a block; 1 where the order does not depend on it."""
        return self._window() if self.repeat_batches > 1 else 1

    def _positions(self, batches: int) -> int:
        return -(-batches // self.window) * self.window * self.repeat_batches

    def batch_sizes(self) -> list[int]:
        """Count the rows of each batch of an epoch on this rank, repetitions included."""
        batches, repeats, window = self._epoch_batches(), self.repeat_batches, self.window
        indices = (repeated_index(position, repeats, window) for position in range(self._positions(len(batches))))
        return [len(batches[index]) if index < len(batches) else 0 for index in indices]

    def describe(self) -> str:
        """Say what an epoch visits, for example ``400 of 800 and 400 of 400 rows``."""
        pairs = zip(self._visited, self._sizes, strict=True)
        return " and ".join(f"{take} of {size}" for take, size in pairs) + " rows"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the rest of the epoch that `place` stands at, one batch at a time."""
        # Asked at the first batch: Lightning calls this before the module can say what it wants.
        yield from self._batches_on_demand() if self.on_demand else self._batches_of_epoch()

    def _batches_on_demand(self) -> Iterator[dict[str, Any]]:
        place, window, rank_count = self.place, self.window, self._shard()[1]
        count = batch_count(sum(self._visited), self.batch_size, rank_count)
        start, place.start = place.start, 0  # a restored place counts once
        for position in range(start, self._positions(count)):
            index = repeated_index(position, self.repeat_batches, window)
            within, place.given = position % (window * self.repeat_batches), position + 1
            if index >= count:
                yield {"prompt": []}
                continue
            if within < window:
                place.starts, self._held = [*place.starts[:within], place.taken], {}
                batch = self.more(self.batch_size)
            else:
                batch = self._batch_of(self._dealt(place.starts[within % window], self.batch_size, {})[0])
            yield batch | ({"batch_number": place.epoch * count + index} if window > 1 else {})

    def more(self, number: int) -> dict[str, Any]:
        """Take further rows for the batch at hand (`on_demand`).

        Args:
            number: Rows a rank; all ranks must ask for as many.

        Returns:
            This rank's, as a batch; fewer, down to none, where the batch has all rows then, and equally many a rank.
        """
        rows, self.place.taken = self._dealt(self.place.taken, number, self._held)
        return self._batch_of(rows)

    def _batch_of(self, rows: Sequence[int]) -> dict[str, Any]:
        rank, rank_count = self._shard()
        return self._collate([self.rows[i] for i in rows[rank::rank_count]]) if rows else {"prompt": []}

    def _dealt(self, start: int, number: int, held: dict[int, int]) -> tuple[list[int], int]:
        """Find the rows that all ranks take from a place on.

        Args:
            start: In all passes' orders laid end to end.
            number: Rows a rank.
            held: Rows that the batch has, by the pass in which it took them; the new ones are added.

        Returns:
            The rows, equally many a rank, dealt in turn; and the place behind them.
        """
        size, rank_count = sum(self._visited), self._shard()[1]
        found: list[tuple[int, int]] = []
        place = start
        while len(found) < number * rank_count and len(held) < len(self.rows):
            number_of_pass, row = place // size, self._order_of(place // size)[place % size]
            place += 1
            if held.setdefault(row, number_of_pass) == number_of_pass:
                found.append((row, place))
        found = found[: len(found) // rank_count * rank_count]
        return [row for row, _ in found], found[-1][1] if found else start

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self.rows))
        if self._known_order[0] != epoch:
            order = epoch_order(self._sizes, self._weights, seed=self._seed, epoch=epoch, stop=self._stop)
            self._known_order = epoch, order
        return self._known_order[1]

    def _batches_of_epoch(self) -> Iterator[dict[str, Any]]:
        batches = self._epoch_batches()
        start, self.place.start = self.place.start, 0  # a restored place counts once
        window, epoch, positions = self.window, self.place.epoch, self._positions(len(batches))

        def at(position: int) -> dict[str, Any]:
            index = repeated_index(position, self.repeat_batches, window)
            if index >= len(batches):
                return {"prompt": []}
            batch = self._collate([self.rows[i] for i in batches[index]])
            return batch | ({"batch_number": epoch * len(batches) + index} if window > 1 else {})

        batch, following, last = dict[str, Any](), None, -1
        for position in range(start, positions):
            index = repeated_index(position, self.repeat_batches, window)
            if index != last:
                batch = at(position) if following is None else following
            following, last, self.place.given = None, index, position + 1
            is_new = (position + 1) % (window * self.repeat_batches) < window
            if self.look_ahead and is_new and position + 1 < positions:
                following = at(position + 1)
            yield {**batch, FOLLOWING: following} if following and following["prompt"] else dict(batch)

    def _epoch_batches(self) -> list[list[int]]:
        rank, world_size = self._shard()
        return rank_batches(self._order_of(self.place.epoch), self.batch_size, rank, world_size)

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            digest.update(row.key.encode("utf-8", "surrogatepass") + b"\0")
        return {
            "rows": f"{len(self.rows)}:{digest.hexdigest()}",
            "batch_size": self.batch_size,
            "world_size": self._shard()[1],
            "repeat_batches": self.repeat_batches,
            "window": self.window,
            "seed": self._seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Say in plain values where training stands: the epoch and the number of batches that were trained on."""
        place = self.place
        batch, taken, starts = max(0, place.given - self._unfinished()), place.taken, place.starts
        if batch < place.given and self._is_new(place.given - 1):  # what it took is taken again
            taken, starts = starts[-1], starts[:-1]
        on_demand = {"taken": taken, "starts": list(starts)} if self.on_demand else {}
        return {**self._identity(), "epoch": place.epoch, "batch": batch, **on_demand}

    def _is_new(self, position: int) -> bool:
        """Whether the batch at a position takes rows that none before it took (`on_demand`)."""
        count = batch_count(sum(self._visited), self.batch_size, self._shard()[1])
        new = position % (self.window * self.repeat_batches) < self.window
        return self.on_demand and new and repeated_index(position, self.repeat_batches, self.window) < count

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            DataError: If the place is in the middle of an epoch of other data or other batches.
        """
        epoch, batch = int(state["epoch"]), int(state["batch"])
        identity = self._identity()
        state = {"window": 1, **state}  # earlier checkpoints have none
        differing = [name for name in _STATE_MEANINGS if state.get(name) != identity[name]]
        if batch < len(self) and differing:
            facts = ", ".join(f"{name} {state.get(name)} -> {identity[name]}" for name in differing)
            changed = " and ".join(_STATE_MEANINGS[name] for name in differing)
            raise DataError(
                "the checkpoint's place in the training data",
                f"it lies within an epoch, and {changed} changed since ({facts})",
                "Resume with the same data settings, or start a new run from the saved adapter.",
            )
        self.place.epoch, self.place.start, self.place.given = epoch, batch, batch
        self.place.taken, self.place.starts = int(state.get("taken", 0)), list(state.get("starts", []))
