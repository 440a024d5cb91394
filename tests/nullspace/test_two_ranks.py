"""Two gloo ranks: half the data each gives the basis of all of it; row-sharded matrices are held like whole ones."""

from __future__ import annotations

import pytest
import torch
from two_processes import spawn
from two_ranks import Adapted, calibrate_job, calibration, curvature_job, sharded_job

from nspo_lightning.nullspace import plan_layers
from nspo_lightning.nullspace.keeper import NullSpaceKeeper


@pytest.mark.timeout(240)
def test_two_ranks_find_the_basis_of_one(tmp_path):
    one = calibration()
    basis = one.bases[""]
    for rank in spawn(calibrate_job, tmp_path):
        for found in rank.values():
            assert found["tokens"] == one.domain_tokens == {"a": 120, "b": 30}
            assert torch.allclose(found["values"], basis.values, rtol=1e-9, atol=1e-12)
            ours, theirs = basis.vectors.double(), found["vectors"].double()
            assert ours.shape == theirs.shape
            assert (ours @ ours.T - theirs @ theirs.T).abs().max() < 1e-6


@pytest.mark.timeout(240)
def test_two_ranks_measure_the_curvature_of_one(tmp_path):
    one = curvature_job(0, tmp_path)
    for found in spawn(curvature_job, tmp_path):
        for name in ("whole", "part"):
            for ours, theirs in zip(one[name], found[name], strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.trace())), name


@pytest.mark.slow  # through the callback, as people use it: tests/callbacks/test_null_space_ddp.py
@pytest.mark.timeout(240)
def test_row_sharded_matrices_are_held_like_whole_ones(tmp_path):
    basis = calibration().bases[""]
    first, second = spawn(sharded_job, tmp_path)
    assert torch.equal(first["A"], second["A"])
    assert first["start_norm"] == pytest.approx(1.0, rel=1e-5)
    for found in (first, second):
        assert max(c.leak for c in found["certificates"]) <= 1e-6
        assert (found["A"] @ basis.vectors).norm() / found["A"].norm() <= 1e-6
        update = found["W"] - found["W_ref"]
        assert float(update.norm()) > 0.1
        assert (update @ basis.vectors).norm() / update.norm() <= 1e-5  # W itself is rounded to float32

    model, dense = Adapted(), torch.nn.Linear(24, 7, bias=False)
    keeper = NullSpaceKeeper([*plan_layers(model).layers, *plan_layers(dense).layers], [basis, basis])
    keeper.start_()
    generator = torch.Generator().manual_seed(4)
    weights = [model.lora_A["default"].weight, model.lora_B["default"].weight, dense.weight]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        keeper.project_gradients_()
        optimizer.step()
        keeper.reproject_()
    assert torch.allclose(first["A"], weights[0].detach(), atol=1e-5)
    assert torch.allclose(first["W"], dense.weight.detach(), atol=1e-5)
