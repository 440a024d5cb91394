"""Write the pages of a run, or of several, beside what they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nspo_lightning.atomic import replacing, without_surrogates
from nspo_lightning.report.html import comparison_page, run_page
from nspo_lightning.report.markdown import comparison_text, run_text
from nspo_lightning.report.records import Run

HTML, MARKDOWN = "report.html", "report.md"


def write_report(run: Run, folder: Path | None = None) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` of a run, into its folder unless another is given; return both paths."""
    return _write(folder or run.folder, run_page(run), run_text(run))


def write_comparison(runs: Sequence[Run], folder: Path) -> tuple[Path, Path]:
    """Write the same of several runs side by side; return both paths."""
    return _write(folder, comparison_page(runs), comparison_text(runs))


def _write(folder: Path, page: str, text: str) -> tuple[Path, Path]:
    files = folder / HTML, folder / MARKDOWN
    for file, content in zip(files, (page, text), strict=True):
        with replacing(file) as partial:
            partial.write_text(without_surrogates(content), encoding="utf-8")
    return files
