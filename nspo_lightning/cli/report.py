"""``python -m nspo_lightning report``: a page of a run, or of several side by side, from the files that they left."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nspo_lightning.cli.help import PROG
from nspo_lightning.cli.parser import PlainParser
from nspo_lightning.cli.run_folder import RUNS
from nspo_lightning.report.reading import NoRunError, find_run, read_run
from nspo_lightning.report.side_by_side import compare
from nspo_lightning.report.words import standing
from nspo_lightning.report.write import write_comparison, write_report

DESCRIPTION = """Write report.html and report.md: what was done, before and after, curves, answers, null space.

  report my-run                     into runs/my-run
  report nspo0 grpo0 --out both     two runs side by side, into both/
"""


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    parsed = _parser().parse_args(arguments)
    folders = list(dict.fromkeys(find_run(name, Path(parsed.runs)) for name in parsed.run))
    if parsed.out is not None and parsed.out.exists() and not parsed.out.is_dir():
        raise NoRunError(f"`--out` must be a folder, and {parsed.out} is a file. Give another one.")
    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        notes, written = standing(runs[0]), write_report(runs[0], parsed.out)
    else:
        out = parsed.out or Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
        notes, written = list(compare(runs).notes), write_comparison(runs, out)
    for note in notes:
        print(f"note: {note}")
    print("\n".join(map(_shown, written)))


def _shown(path: Path) -> str:
    """Return a path from here, where that is shorter."""
    return min((str(path), os.path.relpath(path)), key=len)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog=f"{PROG} report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="name of a run in runs/, or its folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to (the run's own; of several runs the one they are in)",
    )
    parser.add_argument("--runs", default=RUNS, metavar="DIR", help=f"folder of all runs ({RUNS})")
    return parser
