"""A terminal's screen, as far as rich writes to it: text, line ends, and a few control codes."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console

_CODE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|(.)", re.DOTALL)


def terminal(width: int = 80) -> Console:
    """A console that believes to be in a terminal; what it writes is in its `file`."""
    return Console(
        file=StringIO(), force_terminal=True, force_interactive=True, width=width, height=50, color_system=None
    )


def screen(console: Console) -> list[str]:
    """Return the lines that are on a `terminal`'s screen now, without the empty ones at its end."""
    assert isinstance(console.file, StringIO)
    return shown(console.file.getvalue(), console.width)


def shown(written: str, width: int = 80) -> list[str]:
    """Return the lines that are on a screen after all this was written, without the empty ones at its end."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for numbers, letter, character in _CODE.findall(written):
        if letter in ("A", "B"):
            row = max(0, row + int(numbers or 1) * (1 if letter == "B" else -1))
        elif letter == "K":
            lines[row] = [] if numbers == "2" else lines[row][:column]
        elif letter in ("m", "h", "l"):
            pass
        elif letter:
            raise AssertionError(f"this screen does not know the code {numbers}{letter}")
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
        elif character:
            if column == width:
                row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
        lines += [[] for _ in range(row + 1 - len(lines))]
    text = ["".join(line).rstrip() for line in lines]
    while text and not text[-1]:
        text.pop()
    return text
