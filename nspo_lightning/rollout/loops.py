"""The two ways to decode, with the same tokens: shapes that follow the running rows, and shapes that stay.

`decode_dynamically` drops each row as it ends and looks at every token whether one did: the device waits for the host
once a token. `StaticLoop` keeps its shapes and looks once in several tokens, so that the steps between can be queued
ahead, or captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nspo_lightning.rollout.choosing import NonFiniteLogitsError, nonfinite_logits
from nspo_lightning.rollout.draft import Draft
from nspo_lightning.rollout.fixed_memory import FixedMemory
from nspo_lightning.rollout.memory import RowMemory, SharedMemory

LOOK_EVERY = 16
"""Tokens between two looks at which rows have ended: a look waits for the device, and rows that ended before it are
decoded for 8 tokens on average for nothing. 16 makes the first rare and keeps the second small."""
FIRST_CAPACITY = 256
"""Tokens a row that there is room for at first, doubled whenever full: a step reads all of it, written or not, and each
size is captured anew. 256 tokens of 64 rows of a 7B model are 0.9 GB beside its 14 GB of weights, read at each step."""

Step = Callable[[], None]


def decode_dynamically(draft: Draft, memory: SharedMemory | RowMemory, logits: Tensor) -> None:
    """Complete a draft, given its first logits (R, V), dropping rows as they end.

    Raises:
        NonFiniteLogitsError: If there are logits that no token can be drawn from.
    """
    limit = draft.config.max_new_tokens
    rows = torch.arange(len(draft.sequence), device=logits.device)  # the rows that are still running
    for drawn in range(limit):
        token, ended, broken = draft.write(rows, drawn, logits)
        if (stopped := draft.stops(rows, drawn + 1)) is not None:
            ended |= stopped
        some_broken, some_ended = torch.stack([broken.any(), ended.any()]).tolist()  # one synchronisation
        if some_broken:
            raise NonFiniteLogitsError(nonfinite_logits(drawn, int(broken.sum()), len(rows)))
        if some_ended:
            draft.ended_at[rows[ended]] = drawn
            running = (~ended).nonzero().squeeze(1)
            rows, token = rows[running], token[running]
            if len(rows):
                memory.keep(running)
        if len(rows) == 0 or drawn + 1 == limit:
            return
        logits = memory.step(token)


class StaticLoop:
    """Completes a draft in buckets: numbers of rows and capacities that stay for many tokens.

    The first bucket holds all rows; later ones are powers of two, entered when the running rows fit in. Rows that have
    ended go on inside a bucket, and what is drawn for them is never looked at.

    Args:
        draft: The completions under way.
        memory: Keys and values of all rows.
        prepare: Makes what is run from a bucket's step; a new step is asked for with every bucket.
        pays_back: Tokens that must be left for a smaller bucket to be worth a preparation of its own.
    """

    def __init__(self, draft: Draft, memory: FixedMemory, prepare: Callable[[Step], Step], pays_back: int = 0) -> None:
        self._draft, self._memory = draft, memory
        self._prepare, self._pays_back = prepare, pays_back
        self._limit = draft.config.max_new_tokens
        rows, device = len(draft.sequence), draft.sequence.device
        # Of the bucket's rows: which of the draft's they are, their last tokens, and when they ended or broke.
        self._rows = torch.arange(rows, device=device)
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._ended_at = torch.full((rows,), self._limit, device=device)  # the limit = not yet
        self._broken_at = self._ended_at.clone()
        self._looked = 0  # tokens that were looked at

    def run(self, logits: Tensor) -> None:
        """Complete the draft, given its first logits (R, V).

        Raises:
            NonFiniteLogitsError: If there are logits that no token can be drawn from; found at the next look.
        """
        self._draw(logits)
        drawn, step = 1, None
        while (running := self._look(drawn)) and drawn < self._limit:
            count = min(LOOK_EVERY, self._limit - drawn)
            rows, capacity = len(self._rows), self._capacity(drawn - 1 + count)
            is_new = step is None or capacity != self._memory.capacity
            if is_new or self._limit - drawn >= self._pays_back:
                rows = min(rows, 1 << (running - 1).bit_length())
            if step is None or is_new or rows < len(self._rows):
                step = None  # its graph holds memory that the new buffers may need
                self._enter(rows, capacity)
                step = self._prepare(self._step)
            for _ in range(count):
                step()
            drawn += count

    def _step(self) -> None:
        self._draw(self._memory.step(self._token))

    def _draw(self, logits: Tensor) -> None:
        # All results are written in place: a replayed step reads and writes where the captured one did.
        drawn = self._memory.drawn
        token, ended, broken = self._draft.write(self._rows, drawn, logits)
        running = self._ended_at == self._limit
        self._token.copy_(token)
        self._broken_at.copy_(torch.where(broken, self._broken_at.minimum(drawn), self._broken_at))
        self._ended_at.copy_(torch.where(running & ended, drawn, self._ended_at))

    def _look(self, drawn: int) -> int:
        # Return how many rows are running: the one place that waits for the device.
        for so_far in range(self._looked + 1, drawn + 1):  # a row's tokens behind its stop change nothing
            if (stopped := self._draft.stops(self._rows, so_far)) is not None:
                self._ended_at[stopped & (self._ended_at >= so_far)] = so_far - 1
        self._looked = drawn
        self._draft.ended_at[self._rows] = self._ended_at
        # What is drawn behind a row's end may break, and nobody reads it.
        at = torch.where(self._broken_at <= self._ended_at, self._broken_at, self._limit)
        running, first = torch.stack([(self._ended_at == self._limit).sum(), at.min()]).tolist()
        if first < self._limit:
            there = int((self._ended_at >= first).sum())
            raise NonFiniteLogitsError(nonfinite_logits(first, int((at == first).sum()), there))
        return int(running)

    def _capacity(self, needed: int) -> int:
        capacity = max(self._memory.capacity, FIRST_CAPACITY)
        while capacity < needed:
            capacity *= 2
        return min(capacity, self._limit - 1)  # the last token is never an input

    def _enter(self, rows: int, capacity: int) -> None:
        if rows < len(self._rows):
            ended = (self._ended_at < self._limit).int()
            # All that run, in their order (rows of a prompt stay together), and some that fill up.
            kept = ended.argsort(stable=True)[:rows].sort().values
            self._memory.keep(kept)
            self._rows, self._token = self._rows[kept], self._token[kept]
            self._ended_at, self._broken_at = self._ended_at[kept], self._broken_at[kept]
        if capacity > self._memory.capacity:
            self._memory.reserve(capacity)
