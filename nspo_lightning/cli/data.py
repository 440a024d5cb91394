"""What a configuration would train and calibrate on, printed before anything is trained.

The function behind ``python -m nspo_lightning data -c CONFIG``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.sources.read import SourceReport
from nspo_lightning.datamodules.text.collate import calibration_text
from nspo_lightning.datamodules.text.render import ChatRenderer

_EXAMPLE_CHARS = 1200


def data_report(
    datamodule: AlignmentDataModule, tokenizer: Any, console: Console | None = None, examples: int = 3
) -> dict[str, Any]:
    """Print counts, drops with their reasons, lengths and rendered examples.

    Args:
        datamodule: The configured datamodule.
        tokenizer: The policy's tokenizer.
        console: Where to print; standard output when None.
        examples: How many rendered texts of each use are shown.

    Returns:
        The same figures: `sources` (read, dropped, splits, notes) and, for each use, `rows`, `tokens` (min, median,
        p95, max, total) and `domains`.

    Raises:
        DataError: If the data cannot be used.
    """
    console = console or Console()
    datamodule.tokenizer = tokenizer
    renderer = datamodule.general.renderer
    reports = list(datamodule.reports)
    uses = rendered_uses(datamodule, renderer)
    if datamodule.general.calibration_report is not None:
        reports.append(datamodule.general.calibration_report)
    lengths = {use: [len(ids) for ids in renderer.encode([text for text, _ in texts])] for use, texts in uses.items()}
    console.print(_source_table(reports))
    console.print(_use_table(uses, lengths))
    for use, texts in uses.items():
        for text, domain in _spread(texts, examples):
            console.print(_example(use, domain, text))
    return {
        "sources": [
            {"label": r.label, "read": r.read, "dropped": dict(r.dropped), "splits": r.splits, "notes": r.notes}
            for r in reports
        ],
        **{
            use: {
                "rows": len(texts),
                "tokens": length_summary(lengths[use]),
                "domains": dict(Counter(domain for _, domain in texts)),
            }
            for use, texts in uses.items()
        },
    }


def rendered_uses(datamodule: AlignmentDataModule, renderer: ChatRenderer) -> dict[str, list[tuple[str, str]]]:
    """Render what each use would see.

    Args:
        datamodule: The configured datamodule.
        renderer: Applies the chat template.

    Returns:
        For training, calibration and evaluation: each row's text and its domain.
    """
    general = datamodule.general
    by_model = general.calibration_text == "prompt_and_model_answer"
    # No policy is loaded for a report: its answers are left out, and the length limit looks at prompts.
    calibration = general.calibration_rows(lambda prompts: [""] * len(prompts))
    uses = {
        "training": [
            (renderer.text(row.prompt), row.skill) for rows in datamodule.safety.loaded().train for row in rows
        ],
        "calibration" + (" (answers by the policy not shown)" if by_model else ""): [
            (calibration_text(row, general.calibration_text, renderer), row.skill) for row in calibration
        ],
    }
    for split in ("validation", "test"):
        for name, rows in zip(datamodule.eval_names, datamodule.eval_rows(split), strict=True):
            uses[f"{split}: {name}"] = [(renderer.text(row.prompt), row.skill) for row in rows]
    return uses


def length_summary(lengths: Sequence[int]) -> dict[str, int]:
    """Summarise token counts.

    Args:
        lengths: Tokens of each text.

    Returns:
        `min`, `median`, `p95`, `max` and `total`; zeros when there is no text.
    """
    ordered = sorted(lengths) or [0]
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.0, 0.5, 0.95, 1.0)]
    return dict(zip(("min", "median", "p95", "max", "total"), [*at, sum(ordered)], strict=True))


def _source_table(reports: Sequence[SourceReport]) -> Table:
    table = Table(title="What was read", title_justify="left", expand=True)
    for column, ratio in (
        ("source", 4),
        ("for", 2),
        ("rows read", 1),
        ("left out, and why", 4),
        ("kept", 3),
        ("notes", 4),
    ):
        table.add_column(column, ratio=ratio, overflow="fold", justify="right" if column == "rows read" else "left")
    for report in reports:
        reasons = "\n".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "none"
        kept = "\n".join(f"{count:,} {name}" for name, count in report.splits.items())
        cells = (report.label, report.role, f"{report.read:,}", reasons, kept, "\n".join(report.notes))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _use_table(uses: dict[str, list[tuple[str, str]]], lengths: dict[str, list[int]]) -> Table:
    table = Table(title="What it is used for", title_justify="left", expand=True)
    table.add_column("use", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("tokens a text\nmin / median / 95 % / max", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("domains", overflow="fold", ratio=1)
    for use, texts in uses.items():
        *spread, total = length_summary(lengths[use]).values()
        domains = ", ".join(f"{name} {count:,}" for name, count in Counter(d for _, d in texts).most_common(8))
        cells = (use, f"{len(texts):,}", " / ".join(f"{value:,}" for value in spread), f"{total:,}", domains)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _spread(texts: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Pick examples of as many domains as possible, the first of each.

    Args:
        texts: Text and domain of each row.
        count: How many to pick.

    Returns:
        At most `count` of them.
    """
    first: dict[str, tuple[str, str]] = {}
    for text in texts:
        first.setdefault(text[1], text)
    chosen = list(first.values())[:count]
    return chosen + [text for text in texts if text not in chosen][: count - len(chosen)]


def _example(use: str, domain: str, text: str) -> Panel:
    shown = text if len(text) <= _EXAMPLE_CHARS else f"{text[:_EXAMPLE_CHARS]}… ({len(text):,} characters in all)"
    return Panel(Text(shown), title=Text(f"{use} · {domain}"), title_align="left")
