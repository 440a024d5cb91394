"""What a run logged over training: TensorBoard's event files, or the CSV logger's `metrics.csv`."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from nspo_lightning.report.records import Curve

MOST_POINTS = 400
"""Of a curve; longer ones are thinned evenly, their last point is kept."""


_OF_TRAINING = {"reward", "loss", "updates_skipped"}


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return name -> curve of what was logged into a run's folder; empty if nothing was, or it can't be read."""
    found = {**_from_csv(folder / "metrics.csv"), **_from_events(folder)}
    return {name: Curve(name=name, points=_thinned(sorted(points.items()))) for name, points in found.items() if points}


def last_step(curves: Mapping[str, Curve]) -> int | None:
    """Return the last step that anything was logged at."""
    return max((curve.points[-1][0] for curve in curves.values()), default=None)


def _from_events(folder: Path) -> dict[str, dict[int, float]]:
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of half-written events
    kept = {"scalars": 0, "images": 1, "histograms": 1, "audio": 1, "tensors": 1, "compressedHistograms": 1}
    found: dict[str, dict[int, float]] = {}
    for file in files:  # one after another: what a killed run had logged behind the step that it went on from is void
        events = EventAccumulator(str(file), size_guidance=kept)
        events.Reload()
        tags = events.Tags()["scalars"]
        training = [tag for tag in tags if tag.rpartition("/")[2] in _OF_TRAINING]
        if not training:
            continue  # `test` and `validate` log other prompts under the same names, at step 0
        first = min(event.step for tag in training for event in events.Scalars(tag))
        found = {tag: {step: y for step, y in points.items() if step < first} for tag, points in found.items()}
        for tag in tags:
            points = found.setdefault(tag, {})
            points.update({e.step: e.value for e in events.Scalars(tag) if math.isfinite(e.value)})
    return found


def _from_csv(file: Path) -> dict[str, dict[int, float]]:
    if not file.is_file():
        return {}
    found: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8", errors="replace") as rows:
        for row in csv.DictReader(rows):
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text)
                if name and name != "step" and step is not None and value is not None:
                    found.setdefault(name, {})[int(step)] = value
    return found


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thinned(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    if len(points) <= MOST_POINTS:
        return tuple(points)
    chosen = [points[i * len(points) // MOST_POINTS] for i in range(MOST_POINTS)]
    return (*chosen[:-1], points[-1])
