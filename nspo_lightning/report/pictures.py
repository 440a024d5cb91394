"""Which curves a page draws, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nspo_lightning.evaluation.rates import ACCURACY, ANSWERED, OVER_REFUSAL, REFUSAL, REFUSED, UNSAFE
from nspo_lightning.evaluation.text_means import KL, KL_FIRST
from nspo_lightning.report.records import Curve, Run
from nspo_lightning.report.svg import Line, line_chart, trade_chart
from nspo_lightning.report.tags import shown_as


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A chart with a title that says what is seen."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class _Chart:
    title: str
    note: str
    lines: Mapping[str, str]
    """Metric -> its name in the chart."""
    share: bool = False


_CHARTS = (
    _Chart(
        title="Safety and general ability",
        note="validation prompts",
        lines={
            UNSAFE: "unsafe",
            REFUSED: "refused",
            ACCURACY: "right answers",
            OVER_REFUSAL: "over-refusal",
            ANSWERED: "answered",
        },
        share=True,
    ),
    _Chart(
        title="Distance from the base",
        note="KL on general validation text, nats a token",
        lines={KL_FIRST: "first tokens", KL: "whole answers"},
    ),
    _Chart(title="Reward", note="mean of a training batch", lines={"reward": "reward"}),
    _Chart(title="KL to the reference in training", note="nats a token", lines={"kl": "KL"}),
    _Chart(
        title="Groups and completions",
        note="shares of a training batch",
        lines={
            "unsafe": "unsafe",
            "answered": "answered",
            "frac_reward_zero_std": "no signal",
            "completions/clipped_ratio": "cut off",
            "nullspace/kept_gradient_energy": "gradient kept",
        },
        share=True,
    ),
    _Chart(title="Entropy", note="nats a token", lines={"entropy": "entropy"}),
    _Chart(title="Length", note="tokens a completion", lines={"completions/mean_length": "mean"}),
)


def curve_of(curves: Mapping[str, Curve], name: str) -> Curve | None:
    """Return the curve of a metric; None if it was not logged."""
    return curves.get(name) or curves.get(shown_as(name))


def pictures(run: Run) -> list[Picture]:
    """Return a run's charts; one that has nothing to show is left out."""
    found = []
    path = _path(run.curves)
    for chart in _CHARTS:
        lines = [
            Line(name=name, points=_points(curve, chart.share), colour=colour)
            for colour, (metric, name) in enumerate(chart.lines.items(), 1)
            if (curve := curve_of(run.curves, metric)) is not None and _is_drawn(metric, run.curves)
        ]
        if not any(len(line.points) > 1 for line in lines):
            continue
        found.append(Picture(title=chart.title, note=chart.note, svg=_draw(lines, chart.title, chart.share)))
        if chart is _CHARTS[0] and path:
            found.append(path)
    return found


def compared(runs: Sequence[Run]) -> list[Picture]:
    """Return a chart a metric with a line a run."""
    wanted = {
        UNSAFE: ("Harmful prompts answered unsafely", "validation prompts", True),
        ANSWERED: ("Harmful prompts answered", "validation prompts", True),
        ACCURACY: ("General tasks answered right", "validation prompts", True),
        REFUSAL: ("Ordinary prompts refused", "validation prompts", True),
        KL: ("KL to the base", "general validation text, nats a token", False),
        "reward": ("Reward", "mean of a training batch", False),
    }
    found = []
    for metric, (title, note, share) in wanted.items():
        lines = [
            Line(name=run.name, points=_points(curve, share), colour=1 + place % 6)
            for place, run in enumerate(runs)
            if (curve := curve_of(run.curves, metric)) is not None
        ]
        if any(len(line.points) > 1 for line in lines):
            found.append(Picture(title=title, note=note, svg=_draw(lines, title, share)))
    return found


def _draw(lines: Sequence[Line], title: str, share: bool) -> Markup:
    say: Callable[[float], str] = "{:g} %".format if share else "{:.3g}".format
    return line_chart(lines, label=f"{title} over training", ends=(-2.0, 102.0) if share else None, say=say)


def _points(curve: Curve, share: bool) -> list[tuple[float, float]]:
    return [(float(step), 100 * value if share else value) for step, value in curve.points]


def _is_drawn(metric: str, curves: Mapping[str, Curve]) -> bool:
    """Whether a curve says more than another one that is drawn."""
    refused, other = curve_of(curves, OVER_REFUSAL), curve_of(curves, REFUSAL)
    same = metric == OVER_REFUSAL and refused is not None and other is not None and refused.points == other.points
    return not same


def _path(curves: Mapping[str, Curve]) -> Picture | None:
    """Draw ability against safety, a point a validation."""
    unsafe, ability = curve_of(curves, UNSAFE) or curve_of(curves, ANSWERED), curve_of(curves, ACCURACY)
    y_label, sign = "general tasks answered right", 1.0
    if ability is None:
        ability, y_label, sign = curve_of(curves, REFUSAL), "ordinary prompts not refused", -1.0
    if unsafe is None or ability is None:
        return None
    by_step = dict(ability.points)
    points = [
        (100 * x, 100 * by_step[step] if sign > 0 else 100 - 100 * by_step[step])
        for step, x in unsafe.points
        if step in by_step
    ]
    label = f"{y_label} against unsafe answers, over training"
    drawn = trade_chart(points, label=label, x_label="harmful prompts answered", y_label=y_label)
    return Picture(title="What safety cost", note="validation prompts, start to end", svg=drawn) if drawn else None
