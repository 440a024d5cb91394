"""The pictures of a comparison, in colours that stay apart for colour-blind readers (Okabe-Ito, Tol), and markers."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nspo_lightning.compare.distance import UPDATE_NORM
from nspo_lightning.compare.methods import METHODS
from nspo_lightning.compare.plan import RunSpec
from nspo_lightning.compare.results import Findings, RunResult, Value, mean_at
from nspo_lightning.compare.selection import SelectionRule
from nspo_lightning.compare.sweeps import Sweep
from nspo_lightning.evaluation.rates import ACCURACY, OVER_REFUSAL, REFUSAL, UNSAFE, is_at_most
from nspo_lightning.evaluation.text_means import KL, KL_FIRST, NLL, NLL_CHANGE, SAFETY_KL, in_nats
from nspo_lightning.nullspace.domains import START_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
METHOD_STYLES = {
    "nspo": ("#0072B2", "o"),
    "nspo_kl": ("#88CCEE", "v"),
    "b_only": ("#44AA99", ">"),
    "soft": ("#117733", "s"),
    "grpo": ("#D55E00", "X"),
    "grpo_kl": ("#882255", "^"),
    "grpo_mixed": ("#DDAA33", "D"),
    "random": ("#000000", "*"),
    "protected": ("#999999", "P"),
    "gradient": ("#AA4499", "h"),
    "displacement": ("#999933", "d"),
    "contrast": ("#332288", "o"),
    "nspo_mixed": ("#4466DD", "D"),
    "contrast_mixed": ("#6633AA", "D"),
    "nspo_general_kl": ("#0099BB", "p"),
    "contrast_kl": ("#44BB99", "p"),
    "contrast_starts": ("#5566CC", "v"),
    "nspo_starts": ("#3377AA", "v"),
    "weights": ("#661100", "<"),
    "general_kl": ("#009E73", "p"),
    "general_starts": ("#88AA55", "^"),
    "anchor": ("#117755", "*"),
    "nspo_anchor": ("#003366", "*"),
    "nspo_anchor_starts": ("#336699", "*"),
    "nspo_anchor_mixed": ("#5577BB", "*"),
    "contrast_anchor": ("#6644AA", "*"),
    "decay": ("#CC6677", "H"),
    "init_only": ("#6699CC", "d"),
    "init_contrast": ("#AA4466", "8"),
    "ogpsa": ("#E69F00", "s"),
}
_VARIANT_LINES = ("-", "--", ":", "-.")
_VARIANT_SHADES = (1.0, 0.65, 0.4, 0.25)
_WIDEST = 40
"""Characters in a line of an axis's name: longer ones would not fit beside a panel."""
_LINEAR = 5
"""Unsafe rate in % up to which the axis of selected checkpoints is linear; most of them lie there."""
_FRONT_RATES = [x / 8 for x in range(81)]
"""Unsafe rates in % at which fronts are drawn."""


def mean_front(runs: Sequence[RunResult], value: Value) -> list[float]:
    """Average the seeds' fronts at each of `_FRONT_RATES`; NaN where a seed never got there."""
    means = (mean_at(runs, value, rate / 100) for rate in _FRONT_RATES)
    return [mean if mean > -math.inf else math.nan for mean in means]


_WORDS = {
    ACCURACY: "general accuracy",
    NLL: "NLL of general answers",
    NLL_CHANGE: "NLL of general answers above the base's",
    KL: "KL to the base on whole general answers",
    KL_FIRST: f"KL to the base at the first {START_TOKENS} tokens of general answers",
    REFUSAL: "ordinary general prompts refused",
    OVER_REFUSAL: "harmless look-alikes refused",
}
"""What metrics are called on axes."""
_DISTANCES = (KL, KL_FIRST, REFUSAL)
"""What is drawn against safety beside general ability, where it was measured; less is better."""


def in_words(metric: str) -> str:
    """Return what a metric is called on an axis.

    Example:
        >>> in_words("general/nll/say"), in_words("reward_mean")
        ('NLL of general answers: say', 'reward mean')
    """
    for name, words in _WORDS.items():
        if f"{metric}/".startswith(f"{name}/"):
            part = metric.removeprefix(name).strip("/")
            return f"{words}: {part}" if part else words
    return metric.replace("/", " ").replace("_", " ")


def _unit(metric: str) -> tuple[str, float]:
    """Return the unit that a metric is drawn in, and how many of it one is."""
    return ("nats a token", 1.0) if in_nats(metric) else ("%", 100.0)


def tradeoff_figure(findings: Findings) -> Figure:
    """Draw safety against general ability: each method's front (validation), and a point a run (test)."""
    from matplotlib.figure import Figure

    shown = [name for name in _DISTANCES if findings.everywhere(name)]
    columns = 3 if shown else 2
    figure = Figure(figsize=(15 if shown else 11, 5.6 if len(shown) < 2 else 10), layout="constrained")
    grid = figure.subplots(1 if len(shown) < 2 else 2, columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for spare in panels[len(shown) + 2 :]:
        spare.axis("off")
    front, selected, *others = panels[: len(shown) + 2]
    for axes in (front, selected, *others):
        axes.axvline(100 * findings.rule.unsafe_limit, color="0.6", lw=0.8, ls=":")
        _label(axes, "unsafe answers to harmful prompts, %")
    for axes in (front, selected):
        axes.axhline(0, color="0.6", lw=0.8)
        _name(axes, _ability_label(findings.rule))
    _draw_fronts(front, findings, findings.gain, "Fronts: general ability (validation)")
    _draw_selected(selected, findings)
    for axes, name in zip(others, shown, strict=True):
        _draw_distance(axes, findings, name)
        _name(axes, f"{in_words(name)}, {_unit(name)[0]} (less is better)")
    _legend_below(figure, selected, columns=6, size=10)
    return figure


def _draw_distance(axes: Axes, findings: Findings, name: str) -> None:
    times = _unit(name)[1]
    title = f"Fronts: {'distance' if in_nats(name) else 'refusals'} (validation)"
    rule = SelectionRule(metric=name, higher_is_better=False)
    drawn = _draw_fronts(axes, findings, lambda p: times * rule.ability(p), title, sign=-1.0)
    if not in_nats(name):
        _from_zero(axes)
    elif any(value > 0 for value in drawn):  # else nothing to take a logarithm of
        axes.set_yscale("log")


def _draw_fronts(axes: Axes, findings: Findings, value: Value, title: str, sign: float = 1.0) -> list[float]:
    shown: list[float] = []
    for label, runs in findings.trained.items():
        front = [sign * y for y in mean_front(runs, value)]
        axes.plot(_FRONT_RATES, front, label=label, **_style(runs[0].spec, without="marker"))
        shown += front
    axes.set_xlim(-0.2, _FRONT_RATES[-1])
    axes.set_title(title)
    return shown


def _draw_selected(axes: Axes, findings: Findings) -> None:
    for group in (findings.groups[label] for label in findings.trained):
        axes.scatter(
            [100 * r.test[UNSAFE] for r in group.results],
            [findings.gain(r.test, test=True) for r in group.results],
            s=90 if group.method == "nspo" else 50,
            label=group.label,
            edgecolors="white",
            linewidths=0.6,
            **_style(group.results[0].spec, without="linewidth", line=False),
        )
    axes.set_title("Selected checkpoint of each run (test)")
    axes.set_xscale("symlog", linthresh=_LINEAR)
    axes.set_xlabel(f"unsafe answers to harmful prompts, %\n(linear up to {_LINEAR}, logarithmic above)")
    ticks = [0, 1, 2, 3, 4, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlim(-0.2, 105)


FORGETTING_FILES = {UPDATE_NORM: "forgetting_by_norm.png", SAFETY_KL: "forgetting_by_safety_kl.png"}
"""What forgetting is said to follow, and the picture that shows whether it does."""
_FOLLOWED = {
    UPDATE_NORM: "norm of the update, ||D||",
    SAFETY_KL: "KL to the base on harmful prompts, the base's own answers, nats a token",
}


def forgetting_figure(findings: Findings, name: str) -> Figure:
    """Draw the KL on general text against what it is said to follow (`name`): a point a checkpoint (validation)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes: Axes = figure.subplots()
    limit = findings.rule.unsafe_limit
    for label, runs in findings.trained.items():
        points = [p for run in runs for p in run.trajectory if p[name] > 0 and p[KL] > 0]  # on logarithms
        style = _style(runs[0].spec, without="linewidth", line=False)
        for safe in (False, True):
            shown = [p for p in points if is_at_most(p[UNSAFE], limit) is safe]
            look: dict[str, Any] = {"s": 40, "label": label} if safe else {"s": 8}
            axes.scatter([p[name] for p in shown], [p[KL] for p in shown], linewidths=0, **look, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label(axes, _FOLLOWED[name])
    _name(axes, f"{in_words(KL)}, {_unit(KL)[0]}")
    axes.set_title(f"Forgetting: all checkpoints (validation), large = at most {100 * limit:g} % unsafe")
    _legend_below(figure, axes, columns=3, size=9)
    return figure


def curves_figure(findings: Findings) -> Figure:
    """Draw unsafe rate and general ability over rollouts, the mean over seeds at the selected learning rate."""
    from matplotlib.figure import Figure

    curves: list[tuple[Value, str, str]] = [
        (lambda p: 100 * p[UNSAFE], "unsafe answers to harmful prompts, %", "Safety"),
        (findings.gain, _ability_label(findings.rule), "General ability"),
    ]
    if findings.everywhere(REFUSAL):
        curves.append((lambda p: 100 * p[REFUSAL], f"{in_words(REFUSAL)}, %", "Ordinary prompts"))
    figure = Figure(figsize=(5.5 * len(curves), 5.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(curves)))
    for axes, (value, name, title) in zip(panels, curves, strict=True):
        for label in findings.trained:
            group = findings.groups[label]
            xs, ys = _mean_curve([r.trajectory for r in group.results], value)
            if findings.base is not None:
                xs, ys = [0.0, *xs], [value(findings.base.selected), *ys]
            axes.plot(xs, ys, label=label, markevery=2, **_style(group.results[0].spec) | {"markersize": 4})
        _label(axes, "rollouts")
        _name(axes, name)
        if name.endswith("%"):
            _from_zero(axes)
        axes.set_title(f"{title} over training, validation prompts")
    _legend_below(figure, panels[0], columns=4, size=9)
    return figure


def sweep_figure(sweep: Sweep, findings: Findings) -> Figure:
    """Draw a sweep: one line a variant; unsafe rate, general ability and null share side by side."""
    from matplotlib.figure import Figure

    variants = [(place, label) for _, place, label, _ in sweep.variants if label in findings.groups]
    colours = dict(zip(dict.fromkeys(place for place, _ in variants), itertools.cycle(_COLOURS), strict=False))
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(variants)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 3, sharey=True, width_ratios=(1.2, 1.2, 1)))
    for index, (place, label) in enumerate(variants):
        runs, colour = findings.groups[label].results, colours[place]
        values = (
            [100 * r.test[UNSAFE] for r in runs],
            [findings.gain(r.test, test=True) for r in runs],
            [100 * r.null_share for r in runs if r.null_share is not None],
        )
        for axes, numbers in zip(panels, values, strict=True):
            if numbers:
                axes.plot([min(numbers), max(numbers)], [index, index], color=colour, lw=1.5, alpha=0.6)
                axes.plot([fmean(numbers)], [index], "o", ms=7, color=colour, mec="white")
    names = ("unsafe answers, %", _ability_label(findings.rule), "null directions, % of the width")
    for axes, name in zip(panels, names, strict=True):
        _label(axes, textwrap.fill(name, _WIDEST))
    panels[0].set_yticks(range(len(variants)), [label for _, label in variants])
    panels[0].invert_yaxis()
    panels[0].axvline(100 * findings.rule.unsafe_limit, color="0.6", lw=0.8, ls=":")
    panels[1].axvline(0, color="0.6", lw=0.8)
    figure.suptitle(f"{sweep.title}: test prompts; dot = mean, bar = range over seeds", fontsize=12)
    return figure


def _style(spec: RunSpec, without: str = "", *, line: bool = True) -> dict[str, Any]:
    """Return colour, marker and line style of a run's method, the same in every picture; its variants in shades."""
    colour, marker = METHOD_STYLES.get(spec.method, ("#999999", "o"))
    ours = spec.method == "nspo"
    style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 2.6 if ours else 1.4}
    variants = list(METHODS[spec.method].variants)
    place = variants.index(spec.variant) % len(_VARIANT_LINES) if spec.variant in variants else 0
    if line:
        style["linestyle"] = _VARIANT_LINES[place]
    else:
        style["color"] = (colour, _VARIANT_SHADES[place])
    return {key: value for key, value in (style | {"zorder": 5 if ours else 3}).items() if key != without}


def _label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.grid(alpha=0.25)


def _name(axes: Axes, text: str) -> None:
    """Name the vertical axis, in as many lines as it takes to fit."""
    axes.set_ylabel(textwrap.fill(text, _WIDEST))


def _from_zero(axes: Axes) -> None:
    """Let an axis of percentages begin at 0, and show one per cent at least."""
    top = max(1.0, axes.get_ylim()[1])
    axes.set_ylim(-0.02 * top, top)


def _legend_below(figure: Figure, axes: Axes, columns: int, size: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=size, frameon=False)


def _ability_label(rule: SelectionRule) -> str:
    unit = "nats a token" if in_nats(rule.metric) else "points"
    return f"{in_words(rule.metric)}, {'change' if rule.higher_is_better else 'reduction'} in {unit}"


def _mean_curve(trajectories: Sequence[Sequence[Mapping[str, float]]], value: Value) -> tuple[list[float], list[float]]:
    """Average curves; a run that stopped early keeps its last value."""
    xs = sorted({p["rollouts"] for t in trajectories for p in t})
    seen = [[[p for p in t if p["rollouts"] <= x] for t in trajectories] for x in xs]
    return xs, [fmean(value(records[-1]) for records in at if records) for at in seen]
