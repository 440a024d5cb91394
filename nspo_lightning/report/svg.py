"""Small pictures as inline SVG: colours come from the page's style sheet, so that they follow light and dark.

Every text goes through `escape`; numbers are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from nspo_lightning.report.records import Measure

WIDTH, HEIGHT = 360, 226
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 92, 10, 32
_LABEL_GAP = 14.0
_LABEL_SIGNS = 14  # that fit beside a chart
_SMOOTHED = 40  # points from which a curve also gets its moving average


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart: (x, y) pairs, a name written at its end, and which of the page's colours it has."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    ends: tuple[float, float] | None = None,
    say: Callable[[float], str] = "{:.3g}".format,
) -> Markup:
    """Draw curves with their names at their ends.

    Args:
        lines: What is drawn; those without points are left out.
        label: What the picture shows, for readers who don't see it.
        ends: Of the vertical axis; None = those of the data.
        say: Writes a value of the vertical axis.

    Returns:
        The picture; "" without any line.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x0, x1 = _widened(min(xs), max(xs))
    y0, y1 = ends or _widened(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right, below = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT), below - (y - y0) / (y1 - y0) * (below - _TOP)

    parts = [_axes(x0, x1, y0, y1, place, say, "step")]
    for line in lines:
        many = len(line.points) > _SMOOTHED
        placed = [place(x, y) for x, y in line.points]
        parts.append(_path(placed, f"line c{line.colour}{' faint' if many else ''}"))
        if many:
            parts.append(_path([place(x, y) for x, y in _averaged(line.points)], f"line c{line.colour}"))
        x, y = placed[-1]
        parts.append(Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(line.colour, x, y))
    parts += _end_labels([(line, place(*_averaged(line.points)[-1])[1]) for line in lines])
    return _svg(parts, label)


def trade_chart(points: Sequence[tuple[float, float]], *, label: str, x_label: str, y_label: str) -> Markup:
    """Draw the way of a run from its first to its last validation, in per cent: one measure against another."""
    if len(points) < 2:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1 = _widened(min(0.0, *xs), max(xs))
    y0, y1 = _widened(min(ys), max(ys), least=10.0)
    y1 = min(y1, 102.0)

    def place(x: float, y: float) -> tuple[float, float]:
        right, below = WIDTH - 16, HEIGHT - _BOTTOM
        return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT), below - (y - y0) / (y1 - y0) * (below - _TOP)

    placed = [place(x, y) for x, y in points]
    parts = [_axes(x0, x1, y0, y1, place, _percent, x_label, x_say=_percent, right=WIDTH - 16)]
    parts.append(_path(placed, "line c2"))
    parts += [Markup('<circle class="dot c2" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(x, y) for x, y in placed[1:-1]]
    for name, (x, y), kind in (("start", placed[0], "hollow"), ("end", placed[-1], "dot")):
        parts.append(Markup('<circle class="{} c2" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(kind, x, y))
        left = x > WIDTH / 2
        anchor, shift = ("end", -9) if left else ("start", 9)
        parts.append(
            Markup('<text class="name c2" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
                x + shift, y + (16 if y < 30 else -8), anchor, name
            )
        )
    parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_LEFT + 6, _TOP + 8, y_label))
    return _svg(parts, label)


def interval_track(measure: Measure) -> Markup:
    """Draw a share before (hollow) and after (filled) with its intervals, on 0 to 100 %; as wide as its place."""
    if measure.unit != "share":
        return Markup("")
    parts = [Markup('<line class="rail" x1="0%" x2="100%" y1="11" y2="11"/>')]
    parts += [Markup('<line class="rail" x1="{0}%" x2="{0}%" y1="7" y2="15"/>').format(x) for x in (0, 25, 50, 75, 100)]
    for value, kind in ((measure.before, "before"), (measure.after, "after")):
        if value is None:
            continue
        if value.interval is not None:
            low, high = (100 * min(max(end, 0.0), 1.0) for end in value.interval)
            parts.append(
                Markup('<line class="whisker {}" x1="{:.2f}%" x2="{:.2f}%" y1="11" y2="11"/>').format(kind, low, high)
            )
        place = 100 * min(max(value.value, 0.0), 1.0)
        parts.append(Markup('<circle class="{}" cx="{:.2f}%" cy="11" r="5"/>').format(kind, place))
    return Markup('<svg class="track" width="100%" height="22" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def _svg(parts: Sequence[Markup], label: str) -> Markup:
    start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return start + Markup("").join(parts) + Markup("</svg>")


def _path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    way = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return Markup('<path class="{}" d="{}"/>').format(kind, way)


def _axes(
    x0: float,
    x1: float,
    y0: float,
    y1: float,
    place: Callable[[float, float], tuple[float, float]],
    say: Callable[[float], str],
    x_label: str,
    x_say: Callable[[float], str] = "{:g}".format,
    right: float = WIDTH - _RIGHT,
) -> Markup:
    parts = []
    for value in ticks(y0, y1, 5):
        _, y = place(x0, value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, right, y, y))
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                _LEFT - 6, y + 4, escape(say(value))
            )
        )
    for value in ticks(x0, x1, 5):
        x, _ = place(value, y0)
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x, HEIGHT - _BOTTOM + 15, escape(x_say(value))
            )
        )
    middle = (_LEFT + right) / 2
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            middle, HEIGHT - 3, escape(x_label)
        )
    )
    return Markup("").join(parts)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round values between two ends, about so many.

    Example:
        >>> ticks(0.0, 1.0, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9)), 10 * power)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(max(count, 0))]


def _widened(low: float, high: float, least: float = 0.0) -> tuple[float, float]:
    """Return ends a little apart from the data, and never the same."""
    if high - low < least:
        middle = (high + low) / 2
        low, high = middle - least / 2, middle + least / 2
    span = (high - low) or max(abs(high), 1.0) * 0.1
    return low - 0.03 * span, high + 0.03 * span


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _SMOOTHED:
        return list(points)
    half = max(len(points) // 40, 2)
    found = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(i - half, 0) : i + half + 1]]
        found.append((x, sum(near) / len(near)))
    return found


def _end_labels(ends: Sequence[tuple[Line, float]]) -> list[Markup]:
    """Write each line's name beside its end, apart from each other."""
    placed = sorted(ends, key=lambda end: end[1])
    ys: list[float] = []
    for _, y in placed:
        ys.append(max(y, ys[-1] + _LABEL_GAP) if ys else y)
    if ys and (over := ys[-1] - (HEIGHT - _BOTTOM)) > 0:
        ys = [y - over for y in ys]
    x = WIDTH - _RIGHT + 8
    return [
        Markup('<text class="name c{}" x="{}" y="{:.1f}">{}</text>').format(line.colour, x, y + 4, _cut(line.name))
        for (line, _), y in zip(placed, ys, strict=True)
    ]


def _cut(name: str) -> str:
    return name if len(name) <= _LABEL_SIGNS else f"{name[: _LABEL_SIGNS - 1]}\N{HORIZONTAL ELLIPSIS}"


def _percent(value: float) -> str:
    return f"{value:g} %"
