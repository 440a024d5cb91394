"""The pictures of a comparison: axes are named in words that fit, and a change of scale is written beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from compared_runs import finished_run
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from nspo_lightning.compare.distance import UPDATE_NORM
from nspo_lightning.compare.methods import METHODS
from nspo_lightning.compare.pictures import curves_figure, forgetting_figure, sweep_figure, tradeoff_figure
from nspo_lightning.compare.plan import Budget, RunSpec
from nspo_lightning.compare.results import Findings, RunResult
from nspo_lightning.compare.selection import SelectionRule
from nspo_lightning.compare.sweeps import make_sweep

TAG = re.compile(r"\b[a-z]+/[a-z]|_")
NLL = SelectionRule(metric="general/nll", higher_is_better=False)


def run(method: str, seed: int, kl: float, variant: str = "") -> RunResult:
    trajectory = [
        {
            "safety/unsafe_rate": unsafe,
            "general/accuracy": 0.9,
            "general/nll": 1.5 + kl * share,
            "general/kl": kl * share,
            "general/kl_first": 3 * kl * share,
            "general/refusal_rate": 0.0,
            UPDATE_NORM: share,
            "safety/kl": share,
            "steps": step,
            "rollouts": step,
        }
        for step, unsafe, share in ((5.0, 0.08, 0.5), (10.0, 0.02, 1.0))
    ]
    spec = RunSpec(
        method=method, variant=variant, seed=seed, learning_rate=0.1, settings=METHODS[method].settings, group="auto"
    )
    return finished_run(spec, trajectory)


def found(rule: SelectionRule) -> Findings:
    results = [run(method, seed, kl) for method, kl in (("nspo", 0.001), ("grpo", 0.04)) for seed in (0, 1)]
    budget = Budget(steps=10, eval_every=5, stop_unsafe=0.01)
    return Findings(results=results, rule=rule, budget=budget, sweep=None, planned=4)


def figures(rule: SelectionRule) -> Iterator[Figure]:
    yield tradeoff_figure(found(rule))
    yield curves_figure(found(rule))
    yield forgetting_figure(found(rule), UPDATE_NORM)
    sweep = make_sweep("threshold", {}, [])
    results = [run("nspo", seed, 0.001, variant="auto") for seed in (0, 1)]
    yield sweep_figure(sweep, Findings(results=results, rule=rule, budget=found(rule).budget, sweep=sweep, planned=2))


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]


@pytest.mark.parametrize("rule", [SelectionRule(), NLL], ids=["accuracy", "nll"])
def test_what_is_written_is_words_and_inside_of_the_picture(rule: SelectionRule) -> None:
    for figure in figures(rule):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        whole = figure.bbox
        for text in texts(figure):
            assert not TAG.search(text.get_text()), text.get_text()
        for axes in figure.axes:
            for text in (axes.yaxis.label, axes.xaxis.label, axes.title):
                box = text.get_window_extent(canvas.get_renderer())
                if text.get_text() and axes.axison:
                    assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text.get_text()
                    assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text.get_text()


def test_what_less_is_better_of_is_said_with_its_unit() -> None:
    front, *_ = tradeoff_figure(found(NLL)).axes
    assert " ".join(front.get_ylabel().split()) == "NLL of general answers, reduction in nats a token"


def named(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def test_a_change_of_scale_is_marked() -> None:
    for figure in figures(SelectionRule()):
        for axes in figure.axes:
            for scale, label in ((axes.get_xscale(), axes.get_xlabel()), (axes.get_yscale(), axes.get_ylabel())):
                assert scale in ("linear", "log") or "logarithmic above" in label


def test_logarithmic_axes_end_where_the_data_end() -> None:
    distance = named(tradeoff_figure(found(SelectionRule())), "Fronts: distance")
    assert distance.get_yscale() == "log"
    low, high = distance.get_ylim()
    assert 0.0003 < low <= 0.0005
    assert 0.04 <= high < 0.07


def test_shares_are_drawn_from_nothing_on() -> None:
    for figure, title in (
        (tradeoff_figure(found(SelectionRule())), "Fronts: refusals"),
        (curves_figure(found(SelectionRule())), "Ordinary prompts"),
    ):
        low, high = named(figure, title).get_ylim()
        assert -0.1 < low <= 0
        assert high == 1
