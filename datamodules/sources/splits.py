"""Train, validation and test rows of a source: what is held out is decided by each row's text and the seed."""

from __future__ import annotations

from typing import Literal

from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.sources.source import PromptSource

HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 300
"""Over all sources of a domain: enough for a rate within 6 points, and answered in minutes."""
_LARGEST_SHARE = 0.2

HeldOutName = Literal["validation", "test"]
"""Rows for stopping and selection, and rows for the figures that are reported."""


def held_out_size(rows: int, wanted: int | None, sources: int = 1) -> int:
    """Return how many of a source's rows are held out for one purpose: as many as wanted, or a tenth.

    A tenth is at most this one's part of 300, of which each of `sources` has an equal one.
    It is never more than a fifth of the rows, so that training keeps three fifths.
    """
    size = min(HELD_OUT_MOST // sources, round(rows * HELD_OUT_SHARE)) if wanted is None else wanted
    return min(size, int(rows * _LARGEST_SHARE))


def hold_out(
    rows: list[PromptRow], validation: int, test: int, seed: int
) -> tuple[list[PromptRow], dict[HeldOutName, list[PromptRow]]]:
    """Return one source's training rows, which have none of the held-out prompts even when rows repeat, and the others.

    The choice follows a hash of each row's text: adding rows, reordering them or asking for a smaller `fraction` moves
    no row from one side to the other, except at the border.
    """
    chosen = take_ranked(rows, validation + test, f"held out {seed}")
    held = [rows[i] for i in chosen]
    for_test = set(take_ranked(held, test, f"test {seed}"))
    test_rows = [row for i, row in enumerate(held) if i in for_test]
    test_keys = {row.key for row in test_rows}
    validation_rows = [row for i, row in enumerate(held) if i not in for_test and row.key not in test_keys]
    return without(rows, held), {"validation": validation_rows, "test": test_rows}


def without(rows: list[PromptRow], others: list[PromptRow]) -> list[PromptRow]:
    """Leave out rows whose prompt is among others."""
    keys = {row.key for row in others}
    return [row for row in rows if row.key not in keys]


def choose(rows: list[PromptRow], source: PromptSource) -> list[PromptRow]:
    """Apply a source's `fraction` or `count` to its usable rows that are not held out, and keep their order."""
    if source.fraction is not None:
        size = max(1, round(source.fraction * len(rows)))
    elif source.count is not None:
        size = source.count
    else:
        return rows
    return [rows[i] for i in take_ranked(rows, size, f"choose {source.seed}")]
