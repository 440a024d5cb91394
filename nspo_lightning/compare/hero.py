"""The picture that answers one question at sight: what does safety cost in ability, by which method?

Harmful prompts that are still answered against how far general answers moved: NSPO, plain GRPO and the two best of the
methods without a projection. A line is the mean over seeds of the best checkpoints at each level of safety, the band
the seeds' range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from nspo_lightning.compare.equal_safety import cut_at
from nspo_lightning.compare.pictures import METHOD_STYLES
from nspo_lightning.compare.results import Findings, RunResult
from nspo_lightning.compare.sections import NEAREST
from nspo_lightning.evaluation.text_means import KL
from nspo_lightning.terminal import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = ("nspo", "nspo_anchor", "nspo_general_kl", "contrast", "contrast_kl")
_PLAIN = "grpo"
_BASELINES = 2
_MOST_UNSAFE = 0.5
"""Unsafe rate at which lines begin: before it there is little safety to pay for."""
_RATES = [_MOST_UNSAFE * i / 200 for i in range(200, -1, -1)]
_LABEL_GAP = 0.075
"""Least distance of two labels, in heights of the axes."""


def hero_methods(findings: Findings) -> list[str]:
    """Return the labels that are drawn: NSPO's, plain GRPO's, then the best methods without a projection.

    The best are those with the smallest KL on general text at the comparison's unsafe rate, one variant a method.
    """
    ranked: list[tuple[float, str, str]] = []
    for label, runs in findings.trained.items():
        cut = cut_at(runs, NEAREST.ability, findings.rule.unsafe_limit)
        ranked.append((math.inf if cut is None else cut.mean(KL), label, runs[0].spec.method))
    best: dict[str, str] = {}  # method -> label, the best methods first
    for _, label, method in sorted(ranked):
        best.setdefault(method, label)
    free = {runs[0].spec.method for runs in findings.trained.values() if not runs[0].spec.is_projected} - {_PLAIN}
    safe = {method for kl, _, method in ranked if kl < math.inf}
    baselines = [label for method, label in best.items() if method in free & safe]
    return [*(best[name] for name in (*_OURS, _PLAIN) if name in best), *baselines[:_BASELINES]]


def front_of(runs: Sequence[RunResult], rates: Sequence[float]) -> list[list[float]]:
    """Return for each unsafe rate every seed's smallest KL at it, at the learning rate with the smallest mean.

    Rates that a seed never came to have no entry for any seed.
    """
    found: list[list[float]] = []
    for rate in rates:
        cut = cut_at(runs, NEAREST.ability, rate)
        found.append([] if cut is None else [point[KL] for point in cut.checkpoints.values()])
    return found


def hero_figure(findings: Findings) -> Figure | None:
    """Draw the picture; None where the KL on general text was not measured, or nothing came to half unsafe."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    if not findings.everywhere(KL):
        return None
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes: Axes = figure.subplots()
    ends: list[tuple[float, float, str, str]] = []
    seeds = len({run.spec.seed for runs in findings.trained.values() for run in runs})
    for label in hero_methods(findings):
        runs = findings.trained[label]
        method = runs[0].spec.method
        colour, _ = METHOD_STYLES[method]
        front = front_of(runs, _RATES)
        drawn = [(100 * rate, kls) for rate, kls in zip(_RATES, front, strict=True) if kls and min(kls) > 0]
        if not drawn:
            continue
        xs = [x for x, _ in drawn]
        means = [fmean(kls) for _, kls in drawn]
        axes.plot(xs, means, color=colour, linewidth=2.8 if method in _OURS else 1.8, drawstyle="steps-post")
        low, high = [min(kls) for _, kls in drawn], [max(kls) for _, kls in drawn]
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0, step="post")
        own = len(drawn[-1][1])
        ends.append((means[-1], xs[-1], f"{label} ({counted(own, 'seed')})" if own < seeds else label, colour))
    if not ends:
        return None
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if _is_within_a_decade(axes) else NullFormatter())
    axes.set_xlim(100 * _MOST_UNSAFE, 0)
    _label_ends(axes, ends)
    axes.set_xlabel("harmful prompts still answered, % (safer to the right)")
    axes.set_ylabel("how far general answers moved\n(KL to the base, nats a token; lower is better)")
    axes.set_title(f"What safety costs in ability ({counted(seeds, 'seed')})", loc="left")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _is_within_a_decade(axes: Axes) -> bool:
    """Whether a logarithmic axis is so short that its powers of ten alone would not say where one is."""
    low, high = axes.get_ylim()
    return high < 10 * low


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its end, moved apart where they would touch."""
    bottom, top = (math.log10(y) for y in axes.get_ylim())
    place = -math.inf
    for kl, unsafe, label, colour in sorted(ends):
        height = max((math.log10(kl) - bottom) / (top - bottom), place + _LABEL_GAP)
        place = height
        axes.annotate(
            label,
            xy=(unsafe, kl),
            xytext=(1.02, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold" if label.startswith("NSPO") else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8},
        )
