"""Rows done and time left of anything long: bars in a terminal, a line a minute in a log, nothing on other ranks.

All bars that are open in a process are rows of one display, so a bar inside of another one (validation inside of
training) is drawn below it, and lines that are printed meanwhile stand above both.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nspo_lightning import ranks
from nspo_lightning.terminal.counted import counted
from nspo_lightning.terminal.spans import clock_time

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

SECONDS_A_LINE = 60.0
"""A log gets at most one line of a piece of work in so many seconds."""
SECONDS_A_DRAWING = 0.25
LEAST_BAR, MOST_BAR = 6, 24
"""Characters."""
Clock = Callable[[], float]


class Advance(Protocol):
    """What `rows_progress` gives: tell it what was done."""

    def __call__(self, rows: int = 1, *, note: str | None = None, total: int | None = None) -> None:
        """Count rows as done; `note` is shown behind the time left until the next one, `total` is known from now on."""


@dataclass
class Work:
    """How far a piece of work is; numbers and words, nothing is shown here.

    Attributes:
        label: What is done, as "Measuring before training".
        total: Rows in all; None = unknown.
        unit: What is counted, as "row".
        clock: Seconds.
        done: Rows done; what was done before the start says nothing about the speed.
        note: Shown behind the time left.
    """

    label: str
    total: int | None
    unit: str
    clock: Clock
    done: int = 0
    note: str = ""
    start: float = field(init=False)
    last: float = field(init=False)
    done_before: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.last = self.clock()
        self.done_before = self.done

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    @property
    def left(self) -> float | None:
        """Seconds left at the speed so far; None where it can't be told."""
        new = self.done - self.done_before
        if self.total is None or new <= 0:
            return None
        at_last = max(self.total - self.done, 0) * (self.last - self.start) / new
        return max(at_last - (self.clock() - self.last), 0.0)

    def advance(self, rows: int, note: str | None, total: int | None = None) -> None:
        """Count rows as done."""
        self.done += rows
        self.total = self.total if total is None else total
        self.last = self.clock()
        self.note = self.note if note is None else note

    def counted(self) -> str:
        """Say how many rows are done."""
        if self.total is None:
            return counted(self.done, self.unit) if self.done else ""
        return f"{self.done:,} of {counted(self.total, self.unit)}"

    def begun(self) -> str:
        """Say what begins."""
        return self.label + ("" if self.total is None else f": {counted(self.total, self.unit)}") + " ..."

    def line(self) -> str:
        """Say how far it is."""
        left = None if self.left is None else f"{clock_time(self.left)} left"
        return f"{self.label}: {', '.join(part for part in (self.counted(), left, self.note) if part)}"

    def shown(self, room: int) -> str:
        """Say how far it is, beside its label and a bar, and as much of the note as there is room for (characters)."""
        time_said = f"{clock_time(self.elapsed)} gone" if self.left is None else f"{clock_time(self.left)} left"
        said = ", ".join(part for part in (self.counted(), time_said) if part)
        for part in self.note.split(", "):
            if not part or len(said) + 2 + len(part) > room:
                break
            said += f", {part}"
        return said

    def ended(self) -> str:
        """Say that it is over."""
        taken = f"{counted(self.done, self.unit)} in" if self.done else "took"
        return f"{self.label}: {taken} {clock_time(self.elapsed)}"


@contextmanager
def rows_progress(
    label: str,
    total: int | None = None,
    *,
    unit: str = "row",
    done: int = 0,
    announced: bool = True,
    visible: bool = True,
    console: Console | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Advance]:
    """Show how far a piece of work is, while it is under way.

    In a terminal this is a bar that goes away at the end. Elsewhere a first line comes at once (not inside of other
    work that is shown), then at most one a minute, and a last one after more than a minute; they go to standard error.

    Args:
        label: What is done, as "Measuring before training".
        total: Rows in all; None = unknown.
        unit: What is counted, as "update".
        done: Rows that were done before, by a run that goes on.
        announced: Whether a log gets the first line.
        visible: Whether anything is shown; other ranks than the first never show anything.
        console: Where bars are drawn; default: rich's own, which others print to as well.
        clock: Seconds, from any start.

    Yields:
        What is called with the number of rows that were done.

    Example:
        >>> with rows_progress("Scoring", 3, visible=False) as advance:
        ...     for _ in range(3):
        ...         advance()
    """
    work = Work(label=label, total=total, unit=unit, clock=clock, done=done)
    if not (visible and _is_first_rank()):
        yield lambda rows=1, *, note=None, total=None: None
        return
    with _SHOWN.one_more(work, console) as display:
        announced = announced and len(_SHOWN.works) == 1
        shown = _Lines(work, announced=announced) if display is None else _Bar(work, display)

        def advance(rows: int = 1, *, note: str | None = None, total: int | None = None) -> None:
            work.advance(rows, note, total)
            shown.update()

        yield advance
        shown.end()


class _Lines:
    """Work in a log."""

    def __init__(self, work: Work, *, announced: bool) -> None:
        self._work, self._last, self._told = work, work.start, False
        if announced:
            _say(work.begun())

    def update(self) -> None:
        now = self._work.clock()
        if now - self._last >= SECONDS_A_LINE and self._work.done != self._work.total:
            self._last, self._told = now, True
            _say(self._work.line())

    def end(self) -> None:
        if self._told or self._work.elapsed >= SECONDS_A_LINE:
            _say(self._work.ended())


class _Bar:
    """Work in a terminal."""

    def __init__(self, work: Work, display: Live) -> None:
        self._work, self._display, self._drawn = work, display, work.start

    def update(self) -> None:
        now = self._work.clock()
        if now - self._drawn >= SECONDS_A_DRAWING:
            self._drawn = now
            self._display.refresh()

    def end(self) -> None:
        pass


class _Shown:
    """The display that the open bars of this process share."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self._display: Live | None = None
        self._stack = ExitStack()

    @contextmanager
    def one_more(self, work: Work, console: Console | None) -> Iterator[Live | None]:
        """Show one more piece of work meanwhile; None where there is no terminal."""
        if not self.works:
            self._display = self._begin(console)
        self.works.append(work)
        try:
            if self._display is not None:
                self._display.refresh()
            yield self._display
        finally:
            self.works.remove(work)
            if not self.works:
                self._stack.close()
                self._display = None
            elif self._display is not None:
                self._display.refresh()

    def _begin(self, console: Console | None) -> Live | None:
        from rich import get_console
        from rich.errors import LiveError
        from rich.live import Live

        drawn_on = console or get_console()
        if not drawn_on.is_interactive:
            return None
        display = Live(
            console=drawn_on,
            transient=True,
            refresh_per_second=1 / SECONDS_A_DRAWING,
            get_renderable=lambda: _bars(self.works, _drawn_width(drawn_on)),
        )
        try:
            display.start()
        except LiveError:  # an older rich draws one display at a time, and somebody else has one
            return None
        self._stack.callback(display.stop)
        self._stack.enter_context(_logging_above())
        return display


_SHOWN = _Shown()


def _bars(works: Sequence[Work], width: int) -> RenderableType:
    """Draw pieces of work, one line each at any width, and none of them moved by the others' length.

    The bar gives way first, then what is said in the note, from its end, part by part. The last column stays free:
    terminals differ in where the cursor is once a line is full.

    Args:
        works: From the outermost in.
        width: Of the terminal, in characters.

    Returns:
        A line for each.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = []
    for work in works:
        room = width - 1 - len(work.label) - 1
        words = work.shown(room)
        bar = min(room - len(words) - 1, MOST_BAR)
        cells: list[RenderableType] = [Text(work.label, no_wrap=True)]
        if bar >= LEAST_BAR:
            cells.append(ProgressBar(work.total, work.done, width=bar, pulse=work.left is None))
        row = Table.grid(padding=(0, 1))
        for column in (len(work.label), bar)[: len(cells)]:
            row.add_column(width=column, no_wrap=True, overflow="ellipsis")
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_row(*cells, Text(words[: max(room, 1)], no_wrap=True))
        rows.append(row)
    return Group(*rows)


def _drawn_width(console: Console) -> int:
    """Return the width that is really there: `COLUMNS` may be left over from a wider terminal."""
    try:
        return min(console.width, os.get_terminal_size(console.file.fileno()).columns or console.width)
    except (OSError, ValueError, AttributeError):  # no terminal of the system's, as in tests
        return console.width


@contextmanager
def _logging_above() -> Iterator[None]:
    """Send log lines through the display meanwhile: handlers that keep the real streams would write into its bars."""
    proxied = {
        stream: proxy
        for stream, proxy in ((sys.__stderr__, sys.stderr), (sys.__stdout__, sys.stdout))
        if stream is not proxy
    }
    loggers = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    moved = [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream in proxied]
    before = [(handler, handler.stream) for handler in moved]
    for handler, stream in before:
        handler.setStream(proxied[stream])
    try:
        yield
    finally:
        for handler, stream in before:
            handler.setStream(stream)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_first_rank() -> bool:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    first: bool = ranks.rank() == 0 and rank_zero_only.rank == 0  # type: ignore[attr-defined]
    return first
