"""Tables: Markdown for files and TensorBoard, rich for the terminal, and the latter as text for logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from nspo_lightning.atomic import without_surrogates

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from nspo_lightning.evaluation.diagnosis import Finding

_SHORT_WORD = 24  # characters of a word that stands on one line with the numbers


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, align: str = "") -> str:
    r"""Return a Markdown table without a line break at its end; pipes are escaped and line breaks become ``<br>``.

    `align` has one letter a column, ``l`` or ``r``; columns without a letter are left-aligned.

    Example:
        >>> print(markdown_table(["layer", "leak"], [["q|k", 1e-7]], align="lr"))
        | layer | leak |
        |---|--:|
        | q\|k | 1e-07 |
    """
    rule = "".join("--:|" if side == "r" else "---|" for side in align.ljust(len(columns)))
    return without_surrogates("\n".join([_line(columns), f"|{rule}", *map(_line, rows)]))


def fenced(text: str) -> str:
    """Return text as a block of code; the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def markdown_blocks(rows: Iterable[Mapping[str, object]]) -> str:
    """Return records as Markdown blocks, one below the other: for long text, which would squeeze a table's columns.

    Values are shown under their names: numbers and short single words on one line, other text as a block of code.
    """
    parts = []
    for number, row in enumerate(rows, 1):
        values = {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in row.items()}
        small = {n for n, v in row.items() if not isinstance(v, str) or (len(v) <= _SHORT_WORD and " " not in v)}
        small -= {"prompt", "completion", "before", "after"}
        told = ", ".join(f"{name} {value}" for name, value in values.items() if name in small)
        parts.append(f"**{number}.** {_line_of(told)}".rstrip())
        parts += [f"{_line_of(name)}:\n\n{fenced(value)}" for name, value in values.items() if name not in small]
    return without_surrogates("\n\n".join(parts))


def rich_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, align: str = "") -> Table:
    """Return a table for a rich console; whoever needs more (ratios, a full line) sets it on the result.

    Cells are shown as they are, without markup; the title may be empty. `align` has one letter a column, ``l`` or ``r``
    (never wrapped); columns without a letter are left-aligned.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=without_surrogates(title) or None, title_justify="left")
    for column, side in zip(columns, align.ljust(len(columns)), strict=True):
        right = side == "r"
        table.add_column(
            without_surrogates(column), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(without_surrogates(str(cell))) for cell in row))
    return table


def findings_text(findings: Sequence[Finding]) -> Text:
    """Return what to look at as a block of wrapped lines, worst first, each with what mends it."""
    from rich.text import Text

    colours = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    block = Text()
    block.append("What to look at", style="bold")
    for finding in findings:
        block.append(f"\n{finding.severity}: {finding.title}.", style=colours[finding.severity])
        block.append(without_surrogates(f" {finding.text}"))
        block.append(without_surrogates(f"\n  mend: {finding.cure}"))
    return block


def table_text(table: Table) -> str:
    """Return a rich table as plain text of its full width, for a log."""
    from rich import box
    from rich.console import Console

    table.box = box.SIMPLE_HEAD
    console = Console(file=StringIO(), width=10_000)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _line_of(text: str) -> str:
    """Return text on one line that Markdown takes for text."""
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", " ".join(text.split()))


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"
