"""||D||_F from the factors, against D itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_policies import move_adapter_, tiny_base, tiny_policy
from torch import nn

from nspo_lightning.nullspace.movement import Movement


def updates(policy):
    """What PEFT itself would add to each weight."""
    layers = [m for m in policy.modules() if hasattr(m, "get_delta_weight")]
    return [m.get_delta_weight("default").detach().double() for m in layers]


def frobenius(matrices):
    return float(torch.stack([m.square().sum() for m in matrices]).sum().sqrt())


def fresh():
    torch.manual_seed(1)
    return get_peft_model(tiny_base("llama"), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))


def test_a_fresh_adapter_has_not_moved_and_then_has_by_the_norm_of_its_update():
    policy = fresh()
    movement = Movement(policy)
    assert movement.norm() == 0.0
    assert set(map(len, movement.state_dict().values())) == {0}  # nothing to keep of it
    move_adapter_(policy, 0.05)
    assert movement.norm() == pytest.approx(frobenius(updates(policy)), rel=1e-6)


def test_an_adapter_that_was_trained_before_is_measured_from_where_it_starts_also_in_another_process():
    policy = tiny_policy()
    before = updates(policy)
    movement = Movement(policy)
    assert movement.norm() == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    expected = frobenius([new - old for new, old in zip(updates(policy), before, strict=True)])
    assert movement.norm() == pytest.approx(expected, rel=1e-5)
    assert Movement(policy, movement.state_dict()).norm() == movement.norm()
    assert Movement(policy).norm() == pytest.approx(0.0, abs=1e-6)


def test_full_weights_count_and_what_no_layer_covers_is_named():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
    model = nn.Sequential(first, second)
    movement = Movement(model)
    assert movement.uncounted == ("0.bias",)
    with torch.no_grad():
        first.weight += 1.0
        second.weight -= 2.0
    assert movement.norm() == pytest.approx((12 + 4 * 8) ** 0.5)


def test_experts_side_by_side_are_measured_one_by_one():
    policy = tiny_policy("mixtral", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    movement = Movement(policy)
    experts = [layer for layer in movement._layers if layer.experts > 1]
    assert experts, "the test's model must have some"
    before = {layer.name: each_expert(layer) for layer in experts}
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    moved = [new - old for layer in experts for new, old in zip(each_expert(layer), before[layer.name], strict=True)]
    others = [layer for layer in movement._layers if layer.experts == 1]
    movement._layers = tuple(experts)
    assert movement.norm() == pytest.approx(frobenius(moved), rel=1e-5)
    assert others


def each_expert(layer):
    """s B_e A_e of every expert: PEFT's A holds each one's r rows in turn, B's columns go through the experts."""
    down = layer.matrix.detach().reshape(layer.experts, -1, layer.width).double()
    up = layer.output.detach().double()
    up = up.reshape(up.shape[0], -1, layer.experts)
    return [layer.scale * up[:, :, e] @ down[e] for e in range(layer.experts)]
