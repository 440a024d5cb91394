"""``subspace: weights``: updates keep out of what the weights amplify most, whatever text says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_policies import tiny_policy
from torch import nn

from nspo_lightning.nullspace import BasisSettings, ForwardCall, calibrate_modules
from nspo_lightning.nullspace.domains import TO_LEARN
from nspo_lightning.nullspace.projection import project_start
from nspo_lightning.nullspace.weight_directions import weight_directions
from nspo_lightning.policy.unpacked import HeldProduct


class Pair(nn.Module):
    """Two layers with a bias read one input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(12, 5), nn.Linear(12, 9)

    def forward(self, x):
        return self.q(x).sum() + self.k(x).sum()


def calls():
    generator = torch.Generator().manual_seed(1)
    return [ForwardCall(args=(torch.randn(20, 12, generator=generator) * torch.arange(1, 13),))]


def test_they_are_the_right_singular_vectors_of_the_stacked_weights():
    pair = Pair()
    stacked = torch.cat([pair.q.weight, pair.k.weight]).detach().double()
    found = weight_directions([pair.q, pair.k])
    _, values, vectors = torch.linalg.svd(stacked)
    assert torch.allclose((stacked @ found).norm(dim=0)[: len(values)], values, atol=1e-5)
    leading = (vectors[:4] @ found[:, :4]).abs()
    assert torch.allclose(leading, torch.eye(4, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_bias_takes_nothing_from_them(dtype):
    layer = nn.Linear(12, 20)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(layer.bias, std=100.0)  # Qwen2's k_proj has such
    layer = layer.to(dtype)
    found = weight_directions([layer])
    _, _, vectors = torch.linalg.svd(layer.weight.detach().double())
    leading, expected = found[:, :4], vectors[:4].mT
    assert torch.linalg.matrix_norm(leading @ leading.mT - expected @ expected.mT, 2) < 1e-6


@pytest.mark.parametrize("unpacked", [False, True])
def test_those_of_packed_weights_are_of_what_they_unpack_to_and_the_bias_stays(unpacked):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32)
    nn.init.normal_(layer.bias, std=100.0)
    layer = layer.to("cpu")
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    if unpacked:
        HeldProduct(layer).weight()
    bias = layer.bias
    found = weight_directions([layer])
    assert layer.bias is bias
    _, values, vectors = torch.linalg.svd(whole)
    assert torch.allclose((whole @ found).norm(dim=0)[:48], values, atol=1e-5)
    assert torch.linalg.matrix_norm(found[:, :8] @ found[:, :8].mT - vectors[:8].mT @ vectors[:8], 2) < 1e-4


def test_the_base_is_read_and_not_what_an_adapter_adds():
    policy = tiny_policy("llama")
    layer = next(m for m in policy.modules() if hasattr(m, "lora_A"))
    plain = weight_directions([layer.base_layer])
    assert torch.equal(weight_directions([layer]), plain)


def test_as_many_are_protected_as_the_text_says_but_others():
    pair = Pair()
    modules = {"q": pair.q, "k": pair.k}
    settings = BasisSettings(criterion="rank", threshold=4)
    text = calibrate_modules(modules, pair, calls, settings).bases["q"]
    basis = calibrate_modules(modules, pair, calls, replace(settings, subspace="weights")).bases["q"]
    assert (
        (basis.protected, basis.subspace, basis.complement)
        == (text.protected, "weights", False)
        == (4, "weights", False)
    )
    expected = weight_directions([pair.q, pair.k])[:, :4].float()
    assert torch.allclose(basis.vectors.T @ expected @ expected.T @ basis.vectors, torch.eye(4), atol=1e-5)
    overlap = (text.vectors.T @ basis.vectors).square().sum() / 4
    assert overlap < 0.9


@pytest.mark.parametrize("settings", [{"criterion": "contrast"}, {"form": "soft"}])
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="subspace='weights'"):
        BasisSettings(subspace="weights", **settings)


def test_what_is_no_linear_layer_is_refused_by_its_kind():
    with pytest.raises(ValueError, match="a Conv2d is none"):
        weight_directions([nn.Conv2d(1, 1, 1)])


def test_moments_alone_know_no_weights():
    pair = Pair()
    kept = calibrate_modules({"q": pair.q}, pair, calls, BasisSettings(), keep_moments=True)
    with pytest.raises(ValueError, match="needs the weights"):
        kept.recombined(BasisSettings(subspace="weights"))


def learn_calls():
    """General text that uses all directions alike, and prompts that use the last three."""
    generator = torch.Generator().manual_seed(2)
    general = torch.randn(40, 12, generator=generator)
    harmful = torch.randn(40, 12, generator=generator) * torch.tensor([0.01] * 9 + [3.0] * 3)
    starts = torch.zeros(40, dtype=torch.bool)
    return [
        ForwardCall(args=(rows,), domains=(name,) * 40, starts=starts)
        for rows, name in ((general, "a"), (harmful, TO_LEARN))
    ]


def test_updates_can_be_started_in_what_the_prompts_to_learn_use_most():
    pair = Pair()
    settings = BasisSettings(criterion="rank", threshold=3, subspace="to_learn")
    basis = calibrate_modules({"q": pair.q}, pair, learn_calls, settings).bases["q"]
    assert (basis.null_dims, basis.complement) == (3, True)
    assert float(basis.vectors[9:].square().sum()) > 2.9
    start = project_start(basis, torch.randn(2, 12))
    assert float(start[:, :9].norm()) < 0.1 * float(start.norm())
    with pytest.raises(ValueError, match="calibration saw none"):
        calibrate_modules({"q": pair.q}, pair, calls, settings)
