"""From a configured source to its usable rows, with an account of every row that was left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from nspo_lightning.datamodules.sources.convert import BadRow, Reading, convert
from nspo_lightning.datamodules.sources.errors import DataError
from nspo_lightning.datamodules.sources.opening import open_source
from nspo_lightning.datamodules.sources.rows import PromptRow, RawRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource

_CHUNK_ROWS = 512


@dataclass(kw_only=True)
class SourceReport:
    """What became of a source's rows.

    Attributes:
        label: The source.
        read: The rows that were read.
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

    def line(self) -> str:
        """Say it in one line.

        Returns:
            For example ``advbench.csv: 520 rows read, 4 left out (4 longer than 64 tokens); preset advbench``.
        """
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        left_out = f", {sum(self.dropped.values())} left out ({reasons})" if reasons else ", none left out"
        notes = f"; {'; '.join(self.notes)}" if self.notes else ""
        splits = "".join(f"; {count} {name}" for name, count in self.splits.items())
        return f"{self.label}: {self.read} rows read{left_out}{splits}{notes}"


Reject = Callable[[list[PromptRow], PromptSource], "list[str | None]"]
"""Gives, for each of a list of rows, the reason why it is left out (its length), or None."""


def read_source(source: PromptSource, default_kind: Kind, reject: Reject) -> tuple[list[PromptRow], SourceReport]:
    """Read, convert, deduplicate and filter one source.

    Args:
        source: The configured source.
        default_kind: What its rows are unless source or preset says otherwise.
        reject: Gives the reasons why rows are left out.

    Returns:
        The usable rows in their order, and the account.

    Raises:
        DataError: If the source cannot be used.
    """
    report = SourceReport(label=source.label)
    rows: list[PromptRow] = []
    converted = _converted(source, default_kind, report)
    chunk_size = 1 if source.streaming else _CHUNK_ROWS  # a stream must not read past the last row that it needs
    while chunk := list(itertools.islice(converted, chunk_size)):
        for row, reason in zip(chunk, reject(chunk, source), strict=True):
            if reason is None:
                rows.append(row)
            else:
                report.dropped[reason] += 1
        if source.streaming and len(rows) == source.count:
            report.notes.append(f"stream stopped after {source.count} usable rows")
            break
    _check_any_left(source, report, rows)
    return rows, report


def _converted(source: PromptSource, default_kind: Kind, report: SourceReport) -> Iterator[PromptRow]:
    seen: set[str] = set()
    ids: dict[Any, str] = {}
    raw_rows, reading = open_source(source, default_kind, report.notes)
    for raw in raw_rows:
        report.read += 1
        _check_id(reading, raw, ids)
        try:
            row = convert(reading, raw)
        except BadRow as problem:
            if source.bad_rows == "error":
                cure = "Mend or remove the row, or set `bad_rows: drop` to leave such rows out."
                raise DataError(raw.where, str(problem), cure) from problem
            row = f"bad ({str(problem).split(':')[0]})"
        reason = row if isinstance(row, str) else _repeated(source, row, seen)
        if isinstance(row, str) or reason is not None:
            report.dropped[str(reason)] += 1
        else:
            yield row


def _repeated(source: PromptSource, row: PromptRow, seen: set[str]) -> str | None:
    if not source.deduplicate:
        return None
    known = len(seen)
    seen.add(row.key)
    return "with a prompt seen before" if len(seen) == known else None


def _check_any_left(source: PromptSource, report: SourceReport, rows: list[PromptRow]) -> None:
    if report.read == 0:
        raise DataError(source.label, "it holds no rows", "Fetch or write it again, or choose another split.")
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise DataError(
            source.label,
            f"none of its {report.read} rows is usable: {reasons}",
            "Raise `max_prompt_tokens`, or choose other data.",
        )
    missing = sum(not row.answer for row in rows)
    if 0 < missing < len(rows):
        report.notes.append(f"{missing} rows have an empty answer")


def _check_id(reading: Reading, raw: RawRow, ids: dict[Any, str]) -> None:
    column = reading.id_column
    value = raw.data.get(column) if column is not None else None
    if value is None or not isinstance(value, (str, int)):
        return
    if value in ids:
        raise DataError(
            raw.where,
            f"the {column} {value!r} occurs again; it first stood in {ids[value]}",
            f"Make `{column}` unique: remove the copy or renumber it.",
        )
    ids[value] = raw.where


def announce(reports: Iterable[SourceReport]) -> None:
    """Log what became of each source, one line each, on rank zero.

    Args:
        reports: The accounts.
    """
    for report in reports:
        rank_zero_info(report.line())
