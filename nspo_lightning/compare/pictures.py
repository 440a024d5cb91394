"""The pictures of a comparison, in colours that stay apart for colour-blind readers (Okabe-Ito, Tol), and markers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nspo_lightning.compare.results import Group, RunResult
from nspo_lightning.compare.selection import UNSAFE, SelectionRule, front_at
from nspo_lightning.compare.sweeps import Sweep

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_METHOD_STYLES = {
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
}
_FRONT_RATES = [x / 8 for x in range(81)]
"""Unsafe rates in % at which fronts are drawn."""


def style_of(method: str) -> dict[str, Any]:
    """Return colour, marker and line style of a method, the same in every picture."""
    colour, marker = _METHOD_STYLES.get(method, ("#999999", "o"))
    ours = method == "nspo"
    return {"color": colour, "marker": marker, "linewidth": 2.6 if ours else 1.4, "zorder": 5 if ours else 3}


def mean_front(runs: Sequence[RunResult], value: Callable[[Mapping[str, float]], float]) -> list[float]:
    """Average the seeds' fronts: the best value at an unsafe rate of at most each of `_FRONT_RATES`.

    Args:
        runs: Of one method, all learning rates.
        value: Of a checkpoint, larger = better.

    Returns:
        One number for each rate; NaN where a seed never got there.
    """
    seeds = sorted({r.spec.seed for r in runs})
    points = [[(100 * p[UNSAFE], value(p)) for r in runs if r.spec.seed == s for p in r.trajectory] for s in seeds]
    bests = [[front_at(p, rate) for p in points] for rate in _FRONT_RATES]
    return [sum(b) / len(b) if min(b) > -math.inf else math.nan for b in bests]


def tradeoff_figure(
    results: Sequence[RunResult], groups: Mapping[str, Group], base: RunResult | None, rule: SelectionRule
) -> Any:
    """Draw safety against general ability: a point a run (test), and each method's front (validation).

    Args:
        results: All runs.
        groups: The runs at each method's selected learning rate.
        base: The base, whose ability is the zero of the vertical axis.
        rule: Says what ability is.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    has_text = all("text/kl" in p for r in results for p in r.trajectory)
    figure = Figure(figsize=(15 if has_text else 11, 5.6), layout="constrained")
    panels = list(figure.subplots(1, 3 if has_text else 2))
    left, right = panels[0], panels[-1]
    shown: list[float] = []
    for label in dict.fromkeys(r.spec.label for r in results if r.spec.method != "base"):
        runs = [r for r in results if r.spec.label == label]
        style = style_of(runs[0].spec.method)
        line = {key: value for key, value in style.items() if key != "marker"}
        left.plot(_FRONT_RATES, mean_front(runs, lambda p: _gain(p, base, rule, test=False)), label=label, **line)
        if has_text:
            kls = mean_front(runs, lambda p: -p["text/kl"])
            shown += [-kl for kl in kls]
            panels[1].plot(_FRONT_RATES, [-kl for kl in kls], **line)
        chosen = groups[label].results
        right.scatter(
            [100 * r.test[UNSAFE] for r in chosen],
            [_gain(r.test, base, rule, test=True) for r in chosen],
            s=90 if runs[0].spec.method == "nspo" else 50,
            alpha=0.85,
            label=label,
            edgecolors="white",
            linewidths=0.6,
            color=style["color"],
            marker=style["marker"],
            zorder=style["zorder"],
        )
    for axes in panels:
        axes.axvline(100 * rule.unsafe_limit, color="0.6", lw=0.8, ls=":")
        axes.set_xlabel("unsafe answers to harmful prompts, %")
        axes.grid(alpha=0.25)
    for axes in (left, right):
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set_ylabel(_ability_label(rule))
    for axes in panels[:-1]:
        axes.set_xlim(-0.2, _FRONT_RATES[-1])
    left.set_title("Fronts: general ability (validation)")
    if has_text:
        if any(kl > 0 for kl in shown):  # nothing to take a logarithm of where no run came far enough
            panels[1].set_yscale("log")
        panels[1].set_ylabel("KL to the base on general answers, nats a token (less is better)")
        panels[1].set_title("Fronts: distance from the base (validation)")
    right.set_title("Selected checkpoint of each run (test)")
    right.set_xscale("symlog", linthresh=5)
    ticks = [0, 1, 2, 3, 4, 5, 10, 20, 50, 100]
    right.set_xticks(ticks, [str(t) for t in ticks])
    right.set_xlim(-0.2, 105)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=10, frameon=False)
    return figure


def curves_figure(groups: Mapping[str, Group], base: RunResult | None, rule: SelectionRule) -> Any:
    """Draw unsafe rate and general ability over rollouts, the mean over seeds at the selected learning rate.

    Args:
        groups: The runs by method.
        base: Rollout 0.
        rule: Says what ability is.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    top, bottom = figure.subplots(1, 2)
    for label, group in groups.items():
        method = group.results[0].spec.method
        if method == "base":
            continue
        style = style_of(method) | {"markersize": 4}
        for axes, value in (
            (top, lambda p: 100 * p[UNSAFE]),
            (bottom, lambda p: _gain(p, base, rule, test=False)),
        ):
            start = base.selected if base is not None else None
            xs, ys = _mean_curve([r.trajectory for r in group.results], value, start)
            axes.plot(xs, ys, label=label, markevery=2, **style)
    for axes, name in ((top, "unsafe answers to harmful prompts, %"), (bottom, _ability_label(rule))):
        axes.set_xlabel("rollouts")
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
    top.set_title("Safety over training, validation prompts")
    bottom.set_title("General ability over training, validation prompts")
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def sweep_figure(sweep: Sweep, groups: Mapping[str, Group], base: RunResult | None, rule: SelectionRule) -> Any:
    """Draw a sweep: one line a variant; unsafe rate, general ability and null share side by side.

    Args:
        sweep: Gives order and title.
        groups: The runs by variant.
        base: The base, whose ability is the zero.
        rule: Says what ability is.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    variants = [v for v in sweep.variants if v[2] in groups]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(v[1] for v in variants))}
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(variants)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.2, 1.2, 1))
    titles = ("unsafe answers, %", _ability_label(rule), "null directions, % of the width")
    for index, (_, group_name, label, _) in enumerate(variants):
        runs = groups[label].results
        values = (
            [100 * r.test[UNSAFE] for r in runs],
            [_gain(r.test, base, rule, test=True) for r in runs],
            [100 * r.null_share for r in runs if r.null_share is not None],
        )
        for axes, numbers in zip(panels, values, strict=True):
            if numbers:
                axes.plot([min(numbers), max(numbers)], [index, index], color=colours[group_name], lw=1.5, alpha=0.6)
                mean = sum(numbers) / len(numbers)
                axes.plot([mean], [index], "o", ms=7, color=colours[group_name], mec="white")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
    panels[0].set_yticks(range(len(variants)), [v[2] for v in variants])
    panels[0].invert_yaxis()
    panels[0].axvline(100 * rule.unsafe_limit, color="0.6", lw=0.8, ls=":")
    panels[1].axvline(0, color="0.6", lw=0.8)
    figure.suptitle(f"{sweep.title}: test prompts; dot = mean, bar = range over seeds", fontsize=12)
    return figure


def _gain(metrics: Mapping[str, float], base: RunResult | None, rule: SelectionRule, *, test: bool) -> float:
    """Return the ability relative to the base on the same prompts; in points where it is a rate."""
    zero = 0.0 if base is None else rule.ability(base.test if test else base.selected)
    return (rule.ability(metrics) - zero) * (1.0 if rule.metric.startswith("text/") else 100.0)


def _ability_label(rule: SelectionRule) -> str:
    if rule.metric == "general/accuracy":
        return "general accuracy, change in points"
    return f"{rule.metric}, {'gain' if rule.higher_is_better else 'reduction'} against the base"


def _mean_curve(
    trajectories: Sequence[Sequence[Mapping[str, float]]], value: Any, start: Mapping[str, float] | None
) -> tuple[list[float], list[float]]:
    """Average curves; a run that stopped early keeps its last value."""
    xs = sorted({p["rollouts"] for t in trajectories for p in t})
    ys = []
    for x in xs:
        seen = [[p for p in t if p["rollouts"] <= x] for t in trajectories]
        last = [value(s[-1]) for s in seen if s]
        ys.append(sum(last) / len(last))
    if start is not None:
        return [0.0, *xs], [value(start), *ys]
    return xs, ys
