"""From a configured source to its usable rows, with an account of every row that was left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from nspo_lightning.datamodules.sources.cells import BadRow, is_missing
from nspo_lightning.datamodules.sources.chosen import NOT_CHOSEN, RowChoice
from nspo_lightning.datamodules.sources.convert import convert
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.opening import is_builtin, open_source
from nspo_lightning.datamodules.sources.references import with_final_answers
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource
from nspo_lightning.terminal import counted, rows_progress

_CHUNK_ROWS = 512


@dataclass(kw_only=True)
class SourceReport:
    """What became of a source's rows.

    Attributes:
        dropped: Rows left out, by reason.
        notes: What a user should know: the preset that was recognised, answers that are missing.
        splits: Rows in `train`, `validation` and `test` after all choices.
        role: What the source was given for.
    """

    label: str
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    role: str = "train"

    @property
    def reasons(self) -> str:
        """Why rows were left out, for example ``4 longer than 64 tokens``."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())

    def line(self) -> str:
        """Say it in one line, such as ``a.csv: 520 rows read, 4 left out (4 longer than 64 tokens); 516 train``."""
        left_out = f"{self.dropped.total():,} left out ({self.reasons})" if self.dropped else "none left out"
        splits = [f"{count:,} {name}" for name, count in self.splits.items()]
        return "; ".join([f"{self.label}: {counted(self.read, 'row')} read, {left_out}", *splits, *self.notes])


Reject = Callable[[list[PromptRow], PromptSource], "list[str | None]"]
"""Gives, for each of a list of rows, the reason why it is left out (its length), or None."""


def keep_all(rows: list[PromptRow], source: PromptSource) -> list[str | None]:
    """Leave no row out."""
    return [None] * len(rows)


def usable_rows(
    source: PromptSource, default_kind: Kind, reject: Reject = keep_all
) -> tuple[list[PromptRow], SourceReport]:
    """Return the usable rows of one source, converted, deduplicated and filtered, in their order, and the account.

    Args:
        source: The configured source.
        default_kind: What its rows are unless source or preset says otherwise.
        reject: Gives the reasons why rows are left out.

    Raises:
        DataError: If the source cannot be used.
    """
    report = SourceReport(label=source.label)
    rows: list[PromptRow] = []
    converted = _converted(source, default_kind, report)
    chunk_size = 1 if source.streaming else _CHUNK_ROWS  # a stream must not read past the last row that it needs
    with rows_progress(f"Reading {source.label}", announced=False) as advance:
        while chunk := list(itertools.islice(converted, chunk_size)):
            for row, reason in zip(chunk, reject(chunk, source), strict=True):
                if reason is None:
                    rows.append(row)
                else:
                    report.dropped[reason] += 1
            advance(len(chunk))
            if source.streaming and len(rows) == source.count:
                report.notes.append(f"stream stopped after {counted(source.count, 'usable row')}")
                break
    if not rows:
        raise DataError(
            source.label,
            f"none of its {counted(report.read, 'row')} is usable: {report.reasons}",
            "Raise `max_prompt_tokens`, or choose other data.",
        )
    # What a built-in world's code says is exact.
    return with_final_answers(rows, source.answers or ("match" if is_builtin(source) else None), report.notes), report


def _converted(source: PromptSource, default_kind: Kind, report: SourceReport) -> Iterator[PromptRow]:
    seen: set[str] = set()
    ids = Counter[Any]()
    raw_rows, plan = open_source(source, default_kind, report.notes)
    choice = RowChoice(source)
    for raw in raw_rows:
        report.read += 1
        if not choice.takes(raw):
            report.dropped[NOT_CHOSEN] += 1
            continue
        value = raw.data.get(plan.id_column or "")
        if isinstance(value, (str, int, float)) and str(value).strip() and not is_missing(value):
            ids[value] += 1
        try:
            row = convert(plan, raw)
        except BadRow as problem:
            if source.bad_rows == "error":
                cure = "Mend or remove the row, or give the source `bad_rows: drop` to leave such rows out."
                raise DataError(raw.where, str(problem), cure) from problem
            row = f"bad ({str(problem).split(':')[0]})"
        if isinstance(row, str):
            report.dropped[row] += 1
        elif source.deduplicate and row.key in seen:
            report.dropped["with a prompt seen before"] += 1
        else:
            seen.add(row.key)
            yield row
    choice.check_found()
    if ids and len(ids) < (chosen := report.read - report.dropped[NOT_CHOSEN]):
        repeated, missing = sum(count > 1 for count in ids.values()), chosen - ids.total()
        report.notes.append(
            f"`{plan.id_column}` names no row by itself ({counted(repeated, 'value repeats', 'values repeat')}, "
            f"{counted(missing, 'is', 'are')} missing): rows are told apart by their place"
        )


def announce(reports: Iterable[SourceReport]) -> None:
    """Log what became of each source, one line each, on rank zero."""
    for report in reports:
        rank_zero_info(report.line())
