"""What a configuration would train and calibrate on, printed before anything is trained.

The function behind ``python -m nspo_lightning data -c CONFIG``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import get_console
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.sources.read import SourceReport
from nspo_lightning.datamodules.text.collate import calibration_text
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.terminal import counted

_EXAMPLE_CHARS = 1200
_MOST_DOMAINS = 8


class Rendered(NamedTuple):
    """A row as it would be seen."""

    text: str
    domain: str
    kind: str


def check_examples(examples: int) -> None:
    """Refuse less than no examples; ValueError."""
    if examples < 0:
        raise ValueError(f"`--examples` must not be negative, got {examples}. 0 shows none.")


def data_report(datamodule: AlignmentDataModule, console: Console | None = None, examples: int = 3) -> dict[str, Any]:
    """Print counts, drops with their reasons, lengths and rendered examples.

    Args:
        datamodule: The configured datamodule, with a tokenizer or a module that has one.
        console: Where to print; standard output when None.
        examples: How many rendered texts of each use are shown.

    Returns:
        The same figures: `sources` (read, dropped, splits, notes) and, for each use, `rows`, `tokens` (min, median,
        p95, max, total), `domains` and `kinds` (harmful, benign).

    Raises:
        DataError: If the data cannot be used.
    """
    console = console or get_console()
    renderer = datamodule.general.renderer
    reports = list(datamodule.reports)
    uses = rendered_uses(datamodule, renderer)
    if datamodule.general.calibration_report is not None:
        reports.append(datamodule.general.calibration_report)
    tokens = {
        use: length_summary([len(ids) for ids in renderer.encode([row.text for row in rows])])
        for use, rows in uses.items()
    }
    domains = {use: Counter(row.domain for row in rows) for use, rows in uses.items()}
    kinds = {use: Counter(row.kind for row in rows) for use, rows in uses.items()}
    console.print(_source_table(reports))
    console.print(_use_table(tokens, domains, kinds))
    for use, rows in uses.items():
        for row in _spread(rows, examples):
            console.print(_example(use, row))
    return {
        "sources": [
            {"label": r.label, "read": r.read, "dropped": dict(r.dropped), "splits": r.splits, "notes": r.notes}
            for r in reports
        ],
        **{
            use: {
                "rows": len(rows),
                "tokens": tokens[use],
                "domains": dict(domains[use]),
                "kinds": dict(kinds[use]),
            }
            for use, rows in uses.items()
        },
    }


def rendered_uses(datamodule: AlignmentDataModule, renderer: ChatRenderer) -> dict[str, list[Rendered]]:
    """Render what training, calibration and evaluation would see, row by row."""
    general = datamodule.general
    by_model = general.calibration_text == "prompt_and_model_answer"
    # No policy is loaded for a report: its answers are left out, and the length limit looks at prompts.
    calibration = general.calibration_rows(lambda prompts: [""] * len(prompts))
    uses = {
        "training": [
            Rendered(renderer.text(row.prompt), row.skill, row.kind)
            for rows in datamodule.safety.loaded().train
            for row in rows
        ],
        "calibration" + (" (answers by the policy not shown)" if by_model else ""): [
            Rendered(calibration_text(row, general.calibration_text, renderer), row.skill, row.kind)
            for row in calibration
        ],
    }
    for split in ("validation", "test"):
        for name, rows in zip(datamodule.eval_names, datamodule.eval_rows(split), strict=True):
            uses[f"{split}: {name}"] = [Rendered(renderer.text(row.prompt), row.skill, row.kind) for row in rows]
    return uses


def length_summary(lengths: Sequence[int]) -> dict[str, int]:
    """Summarise token counts as `min`, `median`, `p95`, `max` and `total`; zeros when there is no text."""
    ordered = sorted(lengths) or [0]
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.0, 0.5, 0.95, 1.0)]
    return dict(zip(("min", "median", "p95", "max", "total"), [*at, sum(ordered)], strict=True))


def _source_table(reports: Sequence[SourceReport]) -> Table:
    """Show a source a row, and below it in a row of its own what is to be known of it."""
    table = Table(title="What was read", title_justify="left", expand=True, show_lines=True)
    for column, ratio in {"source": 3, "read": 1, "left out, and why": 3, "kept": 2}.items():
        table.add_column(column, ratio=ratio, overflow="fold", justify="right" if column == "read" else "left")
    for report in reports:
        reasons = "\n".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "none"
        kept = "\n".join(f"{count:,} {name}" for name, count in report.splits.items())
        source = "\n".join([f"{report.label} (for {report.role})", *(f"- {note}" for note in report.notes)])
        _add_row(table, source, f"{report.read:,}", reasons, kept)
    return table


def _use_table(
    tokens: dict[str, dict[str, int]], domains: dict[str, Counter[str]], kinds: dict[str, Counter[str]]
) -> Table:
    table = Table(title="What it is used for", title_justify="left", expand=True, show_lines=True)
    table.add_column("use", overflow="fold", ratio=2)
    table.add_column("rows", justify="right")
    table.add_column("tokens a text", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("kinds and domains", overflow="fold", ratio=3)
    for use, counts in domains.items():
        found = tokens[use]
        spread = f"{found['median']:,}, 95 % {found['p95']:,}\n{found['min']:,} to {found['max']:,}"
        named = ", ".join(f"{name} {count:,}" for name, count in kinds[use].most_common())
        names = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(_MOST_DOMAINS))
        more = f" and {len(counts) - _MOST_DOMAINS} more" if len(counts) > _MOST_DOMAINS else ""
        _add_row(table, use, f"{counts.total():,}", spread, f"{found['total']:,}", f"{named}\n{names}{more}")
    table.caption, table.caption_justify = "tokens a text: median, 95 % have at most; smallest to largest", "left"
    return table


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # `Text`: data is shown as it is, not read as markup


def _spread(rows: Sequence[Rendered], count: int) -> list[Rendered]:
    """Pick at most `count` examples of as many kinds and domains as possible, the first of each."""
    first: dict[tuple[str, str], Rendered] = {}
    for row in rows:
        first.setdefault((row.kind, row.domain), row)
    chosen = list(first.values())[:count]
    return chosen + [row for row in rows if row not in chosen][: count - len(chosen)]


def _example(use: str, row: Rendered) -> Panel:
    shown, size = row.text, len(row.text)
    if size > _EXAMPLE_CHARS:
        shown = f"{shown[:_EXAMPLE_CHARS]}… ({counted(size, 'character')} in all)"
    return Panel(Text(shown), title=Text(f"{use} · {row.domain} · {row.kind}"), title_align="left")
