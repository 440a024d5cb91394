"""The picture of safety against ability: who is on it, what is drawn of whom, and when there is none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from compared_runs import finished_run

from nspo_lightning.compare.hero import front_of, hero_figure, hero_methods
from nspo_lightning.compare.methods import METHODS
from nspo_lightning.compare.plan import Budget, RunSpec
from nspo_lightning.compare.results import Findings, RunResult
from nspo_lightning.compare.selection import SelectionRule

KL_AT_TWO_PER_CENT = {  # method -> variant -> KL
    "nspo": {"": 0.001},
    "grpo": {"": 0.04},
    "general_kl": {"GRPO + 1 KL on general text": 0.003, "GRPO + 0.1 KL on general text": 0.004},
    "grpo_mixed": {"": 0.005},
    "ogpsa": {"": 0.02},
    "random": {"": 0.002},
}


def run(method: str, variant: str, seed: int, kl: float, *, measured: bool = True) -> RunResult:
    settings = {**METHODS[method].settings, **(METHODS[method].variants[variant].settings if variant else {})}
    trajectory = [
        {"safety/unsafe_rate": unsafe, "general/accuracy": 0.9, "steps": step, "rollouts": step}
        | ({"general/kl": kl * share * (1 + 0.1 * seed)} if measured else {})
        for step, unsafe, share in ((5.0, 0.4, 0.5), (10.0, 0.02, 1.0))
    ]
    spec = RunSpec(method=method, variant=variant, seed=seed, learning_rate=0.1, settings=settings)
    return finished_run(spec, trajectory)


def found(*, measured: bool = True) -> Findings:
    results = [
        run(method, variant, seed, kl, measured=measured)
        for method, variants in KL_AT_TWO_PER_CENT.items()
        for variant, kl in variants.items()
        for seed in (0, 1)
    ]
    rule = SelectionRule()
    return Findings(
        results=results,
        rule=rule,
        budget=Budget(steps=10, eval_every=5, stop_unsafe=0.01),
        sweep=None,
        planned=len(results),
    )


def test_nspo_grpo_and_the_two_best_methods_without_a_projection_are_drawn() -> None:
    assert hero_methods(found()) == ["NSPO", "GRPO", "GRPO + 1 KL on general text", "GRPO, general prompts mixed in"]


def test_a_subspace_is_a_projection_and_a_start_in_one_is_none() -> None:
    held = {name for name in METHODS if METHODS[name].trains and run(name, "", 0, 1.0).spec.is_projected}
    free = {"grpo", "grpo_kl", "grpo_mixed", "general_kl", "general_starts", "anchor", "decay", "ogpsa", "init_only"}
    free.add("init_contrast")
    assert held == {name for name, method in METHODS.items() if method.trains} - free


def test_a_line_begins_where_all_seeds_are_and_its_band_is_their_range() -> None:
    runs = found().trained["NSPO"]
    assert front_of(runs, [0.5, 0.1, 0.01]) == [pytest.approx([0.0005, 0.00055]), pytest.approx([0.001, 0.0011]), []]
    figure = hero_figure(found())
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [
        "NSPO",
        "GRPO + 1 KL on general text",
        "GRPO, general prompts mixed in",
        "GRPO",
    ]
    heights = [text.get_position()[1] for text in axes.texts]
    assert all(above - below >= 0.07 for below, above in itertools.pairwise(heights))
    assert axes.get_title(loc="left") == "What safety costs in ability (2 seeds)"
    line, band = axes.lines[0], axes.collections[0]
    assert float(np.asarray(line.get_ydata())[-1]) == pytest.approx(0.00105)
    assert band.get_datalim(axes.transData).ymin == pytest.approx(0.0005)


def test_without_a_measured_distance_there_is_no_picture() -> None:
    assert hero_figure(found(measured=False)) is None
