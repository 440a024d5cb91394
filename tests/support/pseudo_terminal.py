"""Run the command line in a pseudo-terminal, in a forked process, and read what is on its screen, as pyte draws it.

A fork has everything imported: a run takes seconds. The terminal scrolls; what has left the screen at the top is kept.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyte
import rich
from forked import end_with, log_to_stderr

ROWS = 24
"""Height of the terminal."""


@dataclass
class Terminal:
    """What was seen.

    Attributes:
        code: Exit code of the process, negative if a signal ended it.
        lines: All lines, those that scrolled away first, without empty ones at the end.
        screens: The screen after each piece of output.
    """

    code: int = 0
    lines: list[str] = field(default_factory=list)
    screens: list[list[str]] = field(default_factory=list)

    columns: int = 80

    @property
    def text(self) -> str:
        """All lines, those joined that the terminal broke at its edge."""
        return "".join(line if len(line) == self.columns else f"{line}\n" for line in self.lines)


def in_terminal(
    folder: Path,
    work: Callable[[], None],
    *,
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[list[str], int], None] = lambda screen, child: None,
) -> Terminal:
    """Do something in a forked process whose terminal is a new one.

    Args:
        folder: Where the process runs.
        work: What it does.
        columns: Width of the terminal.
        environment: Variables of the process.
        watch: Called with the screen and the process's id after each piece of output; may send it a signal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        end_with(lambda: _start(folder, work, environment or {}))
    screen = pyte.HistoryScreen(columns, ROWS, history=10_000, ratio=0.5)
    stream, seen, deadline = pyte.ByteStream(screen), Terminal(columns=columns), time.monotonic() + 240
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            output = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        stream.feed(output)
        seen.screens.append([line.rstrip() for line in screen.display])
        watch(seen.screens[-1], child)
    os.close(terminal)
    seen.code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    gone = ["".join(line[column].data for column in range(columns)).rstrip() for line in screen.history.top]
    seen.lines = gone + [line.rstrip() for line in screen.display]
    while seen.lines and not seen.lines[-1]:
        seen.lines.pop()
    return seen


def _start(folder: Path, work: Callable[[], None], environment: Mapping[str, str]) -> None:
    """Do the work in this process, with its own streams."""
    os.chdir(folder)
    os.environ |= {"TERM": "xterm-256color", "HF_DEACTIVATE_ASYNC_LOAD": "1"}  # torch's pool survives no fork
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    os.environ |= environment
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)
    log_to_stderr()
    rich.reconfigure()
    warnings.simplefilter("ignore")
    work()
