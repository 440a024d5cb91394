"""Layers that not every batch reaches, or that read now one tensor and now another: each has its own inputs' moment."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from routes import PLANS_OF_RANKS, WIDTH, Routes, calibrated, calls_of
from torch import Tensor
from two_processes import spawn
from two_ranks import routes_job

from nspo_lightning.nullspace.budget import peak_bytes

ONE_INPUT = peak_bytes([WIDTH], 1, "cpu") / 1e9
BUDGETS = {
    "none": None,
    "one input": 1.05 * ONE_INPUT,
    "three inputs": 2.2 * ONE_INPUT,
    "sketches": 28 * 20 * WIDTH / 1e9,
}


def left(given: list[Tensor], basis: Any) -> tuple[float, float]:
    """Return the energy of a layer's inputs outside what is protected, and the least that any basis leaves."""
    rows = torch.cat(given).double()
    u = basis.vectors.double()
    values = torch.linalg.svdvals(rows).square()
    return float((rows - rows @ u @ u.T).square().sum() / values.sum()), float(
        values[u.shape[1] :].sum() / values.sum()
    )


PLANS: dict[str, list[list[tuple[str, int]]]] = {
    "leaves its group": [[("a", 0), ("b", 0), ("c", 1)], [("a", 0), ("b", 2), ("c", 1)]],
    "two leave": [[("a", 0), ("b", 0), ("c", 0)], [("a", 0), ("b", 2), ("c", 1)]],
    "reached later": [[("a", 0), ("b", 0)], [("a", 0), ("b", 0), ("c", 1)]],
    "later, by two": [[("a", 0)], [("a", 0), ("b", 2), ("c", 2)]],
    "called less often": [[("a", 0), ("b", 0)], [("a", 0), ("a", 1), ("b", 0), ("c", 2)]],
    "now this, now that": [[("a", 0), ("b", 0)], [("c", 1), ("b", 2)], [("a", 2)]],
}


@pytest.mark.parametrize(("plans", "budget"), product(PLANS, BUDGETS))
def test_each_layer_has_the_basis_of_its_own_inputs(plans: str, budget: str) -> None:
    model, calls = Routes("abc"), calls_of(PLANS[plans])
    found = calibrated(model, calls, BUDGETS[budget])
    assert sorted(name for names in found.groups.values() for name in names) == ["a", "b", "c"]
    assert found.groups.keys() == found.bases.keys()
    once = Routes("abc")
    for call in calls:
        once(*call.args)
    for name, given in once.given.items():
        basis = found.basis_of(name)
        assert basis.protected == 6
        ours, best = left(given, basis)
        assert ours <= 1.02 * best + 1e-6


def test_a_layer_that_leaves_its_group_costs_one_pass() -> None:
    calls = calls_of(PLANS["leaves its group"])
    model = Routes("abc")
    calibrated(model, calls, None)
    assert model.batches == 2 * len(calls)
    model = Routes("abc")
    found = calibrated(model, calls, BUDGETS["one input"])
    assert model.batches == 1 + 3 * len(calls)  # one looks who shares inputs
    assert [basis.protected for basis in found.bases.values()] == [6, 6, 6]


@pytest.mark.timeout(240)
def test_ranks_whose_text_takes_other_routes_agree(tmp_path: Path) -> None:
    """Each rank's first batch calls other layers, in another order, and shares other inputs."""
    calls, one = calls_of(PLANS_OF_RANKS), Routes("abcd")
    for call in calls:
        one(*call.args)
    first, second = spawn(routes_job, tmp_path)
    for rank in (first, second):
        assert rank.keys() == {"none", "one input", "sharded"}
        for bases in rank.values():
            for name, given in one.given.items():
                ours, best = left(given, bases[name])
                assert ours <= 1.02 * best + 1e-6
