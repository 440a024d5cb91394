"""The comparison on the vision network: each method does what its name says, and the summary picks by its rule."""

from __future__ import annotations

import importlib
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("vision_methods")


@pytest.fixture
def start(bench):
    pl.seed_everything(0, verbose=False)
    teacher = bench.Digits()
    teacher.learn(0)
    return teacher, bench.tasks()


@pytest.mark.parametrize(
    "name", ["null space, auto", "null space, auto + 10 KL", "10 KL on old images", "null space, auto + anchor 100"]
)
def test_a_method_keeps_the_old_task_closer_than_plain_training(name, bench, start, monkeypatch):
    monkeypatch.setattr(bench, "UPDATES", 20)
    plain, kept = (bench.run(*start, bench.METHODS[method], 1e-3) for method in ("plain", name))
    assert [point["update"] for point in kept] == [10, 20]
    assert 0 < kept[-1]["kl"] < plain[-1]["kl"] / 2


def test_a_penalty_and_replay_are_added_to_the_new_task(bench, start):
    teacher, sets = start
    batch, losses = sets[1, "train"], {}
    for name in ("plain", "10 KL on old images", "replay"):
        student = bench.Student(teacher, bench.METHODS[name], 1e-3, sets[0, "train"])
        with torch.no_grad():
            next(student.body.parameters()).mul_(1.1)
        losses[name] = float(student.training_step(batch, 0).detach())
        assert student.task == 1
    assert losses["10 KL on old images"] > losses["plain"]
    assert losses["replay"] != losses["plain"]


def test_the_summary_takes_the_nearest_of_what_has_learnt(bench):
    far, near = ({"update": u, "new": new, "old": 99.0, "kl": kl} for u, new, kl in ((10, 96.0, 0.5), (20, 97.0, 0.1)))
    early = {"update": 10, "new": 80.0, "old": 100.0, "kl": 0.0}
    runs = {
        (rate, seed): [early, far, near] if rate == bench.RATES[1] else [early]
        for rate in bench.RATES
        for seed in (0, 1)
    }
    found = bench.summary(runs, 2)
    assert (found["rate"], found["kl"], found["fewest"]) == (bench.RATES[1], 0.1, 10)
    assert bench.summary({key: [early] for key in runs}, 2) == {"rate": None, "best": 80.0}
