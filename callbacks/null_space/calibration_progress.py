"""How far a calibration is: a bar for each pass over the text, and one for the bases that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from nspo_lightning.nullspace.passes import Report
from nspo_lightning.terminal import Advance, rows_progress

_UNITS = {"batches": "batch", "layers": "layer"}
"""Stage of a calibration -> what is counted in it."""


@contextmanager
def calibration_progress(*, visible: bool, ask: Callable[[], None]) -> Iterator[Report]:
    """Give what `calibrate_modules` reports to; `ask` is asked after each batch and each basis, on all ranks alike."""
    passes, last = 0, 0
    advance: Advance = lambda rows=1, *, note=None, total=None: None  # noqa: E731
    with ExitStack() as stack:

        def report(stage: str, done: int, total: int | None) -> None:
            nonlocal passes, last, advance
            if done == 0:
                passes += stage == "batches"
                label = f"Calibrating, pass {passes}" if stage == "batches" else "Making bases"
                stack.close()
                advance = stack.enter_context(rows_progress(label, total, unit=_UNITS[stage], visible=visible))
            elif done > last:
                advance(done - last)
            last = done
            ask()

        yield report
