"""What a run was, on one page: read from the files that it left, written as HTML and Markdown from the same data."""

from nspo_lightning.report.reading import NoRunError, read_run
from nspo_lightning.report.records import Run
from nspo_lightning.report.write import write_comparison, write_report

__all__ = ["NoRunError", "Run", "read_run", "write_comparison", "write_report"]
