"""The three steps without any framework: each guard is seen to matter."""

from __future__ import annotations

import pytest
import torch
from null_space_problems import LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from nspo_lightning.nullspace import BasisSettings, ForwardCall, calibrate_modules, plan_layers
from nspo_lightning.nullspace.basis import Form
from nspo_lightning.nullspace.keeper import NullSpaceKeeper, certify_layers, references_of


class Adapted(LoraLinear):
    """The design's regression: 128 wide, 48 protected directions, rank 8."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(128, 64, 8, bias=False)


def train(
    start: int, gradients: int, displacement: int, form: Form = "hard", softness: float = 0.01
) -> tuple[float, float, float]:
    model = Adapted()
    general = torch.randn(400, 48) @ torch.randn(48, 128) / 48**0.5
    settings = BasisSettings(criterion="energy", threshold=1e-9, form=form, softness=softness)
    found = calibrate_modules({"": model}, model, lambda: [ForwardCall(args=(general,))], settings)
    layers, bases = plan_layers(model).layers, [found.basis_of("")]
    references = references_of(layers)
    keeper = NullSpaceKeeper(
        layers, bases, references, project_gradients=bool(gradients), project_displacement=bool(displacement)
    )
    if start:
        keeper.start_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.register_step_pre_hook(lambda *_: keeper.remember())
    optimizer.register_step_post_hook(lambda *_: keeper.reproject_())
    inputs, targets = torch.randn(96, 128), torch.randn(96, 64)
    before = model(general).detach()
    for _ in range(120):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        keeper.project_gradients_()
        optimizer.step()
    moved = float((model(general).detach() - before).norm() / before.norm())
    return certify_layers(layers, bases, references, {})[0].leak, loss.item(), moved


def test_each_step_is_needed():
    leaks = {steps: train(*steps)[0] for steps in [(0, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)]}
    assert leaks[0, 0, 0] > 0.3
    assert leaks[0, 1, 0] > 0.1  # projecting gradients alone does not hold under Adam
    assert leaks[1, 1, 0] > 0.1
    assert leaks[1, 1, 1] <= 1e-6
    assert leaks[0, 1, 1] <= 1e-6
    assert train(1, 1, 1)[1] < train(1, 0, 1)[1] * 1.02  # and it is no worse at its task than displacement only


def test_the_function_on_general_inputs_does_not_move():
    assert train(1, 1, 1)[2] < 1e-5
    assert train(0, 0, 0)[2] > 0.1


def test_softness_trades_general_outputs_for_freedom():
    moved = [train(1, 1, 1, form="soft", softness=softness)[2] for softness in (1e-6, 1e-4, 1e-2)]
    assert moved[0] < 0.02
    assert moved == sorted(moved)
    assert moved[-1] < train(0, 0, 0)[2]


def test_soft_steps_equal_the_whitened_optimizer():
    """A = A~ S with the optimizer on A~: the same trajectory, though no inverse of S is ever formed."""
    torch.manual_seed(1)
    model = Adapted()
    general = torch.randn(500, 128) * torch.logspace(0.5, -1, 128)
    settings = BasisSettings(form="soft", softness=0.05)
    found = calibrate_modules({"": model}, model, lambda: [ForwardCall(args=(general,))], settings)
    basis = found.basis_of("")
    assert basis.weights is not None
    operator = torch.eye(128) - basis.vectors * basis.weights @ basis.vectors.T
    keeper = NullSpaceKeeper(plan_layers(model).layers, [basis])
    keeper.start_()
    weight = model.down.weight
    nn.init.normal_(model.up.weight)
    whitened = nn.Parameter(torch.linalg.solve(operator.double(), weight.detach().double().T).T.contiguous())
    ours = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    theirs = torch.optim.AdamW([whitened], lr=1e-3, weight_decay=0.0)
    ours.register_step_post_hook(lambda *_: keeper.reproject_())
    inputs, targets = torch.randn(64, 128), torch.randn(64, 64)
    for _ in range(20):
        ours.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        assert weight.grad is not None
        whitened.grad = (weight.grad.double() @ operator.double()).clone()
        keeper.project_gradients_()
        keeper.remember()
        ours.step()
        theirs.step()
    expected = whitened.detach() @ operator.double()
    assert (weight.detach() - expected).abs().max() / expected.abs().max() < 1e-4


def test_a_skipped_step_leaves_soft_matrices_alone():
    model = Adapted()
    general = torch.randn(500, 128)
    found = calibrate_modules({"": model}, model, lambda: [ForwardCall(args=(general,))], BasisSettings(form="soft"))
    keeper = NullSpaceKeeper(plan_layers(model).layers, [found.basis_of("")])
    weight = model.down.weight
    weight.grad = torch.randn_like(weight)
    before = weight.detach().clone()
    keeper.project_gradients_()  # and the scaler skips the optimizer step
    assert torch.equal(weight, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_full_weights_return_to_their_reference_in_protected_directions(transposed):
    torch.manual_seed(0)
    layer: nn.Linear | Conv1D = nn.Linear(32, 20, bias=False)
    if transposed:
        layer = Conv1D(20, 32)
        layer.bias.requires_grad_(False)
    general = torch.randn(10, 32)
    settings = BasisSettings(criterion="energy", threshold=1e-12)
    found = calibrate_modules({"": layer}, layer, lambda: [ForwardCall(args=(general,))], settings)
    layers, bases = plan_layers(layer).layers, [found.basis_of("")]
    references = references_of(layers)
    keeper = NullSpaceKeeper(layers, bases, references)
    keeper.start_()
    before, reference = layer(general).detach(), layer.weight.detach().clone()
    optimizer = torch.optim.AdamW([layer.weight], lr=1e-2, weight_decay=0.1)
    optimizer.register_step_post_hook(lambda *_: keeper.reproject_())
    inputs, targets = torch.randn(64, 32), torch.randn(64, 20)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(inputs) - targets).square().mean().backward()
        keeper.project_gradients_()
        optimizer.step()
    assert (layer.weight - reference).norm() > 0.5
    assert (layer(general) - before).abs().max() / before.abs().max() < 1e-5
    assert certify_layers(layers, bases, references, {})[0].leak <= 1e-6


def test_a_matrix_without_gradient_is_passed_over():
    model = Adapted()
    found = calibrate_modules(
        {"": model},
        model,
        lambda: [ForwardCall(args=(torch.randn(40, 128),))],
        BasisSettings(criterion="rank", threshold=9),
    )
    keeper = NullSpaceKeeper(plan_layers(model).layers, [found.basis_of("")])
    energy = keeper.project_gradients_(measure=True)
    assert energy is not None
    assert float(energy.before) == 0
    assert model.down.weight.grad is None


def test_measured_energies_are_those_of_the_gradients():
    model = Adapted()
    found = calibrate_modules(
        {"": model},
        model,
        lambda: [ForwardCall(args=(torch.randn(400, 128),))],
        BasisSettings(criterion="rank", threshold=60),
    )
    keeper = NullSpaceKeeper(plan_layers(model).layers, [found.basis_of("")])
    weight = model.down.weight
    weight.grad = torch.randn_like(weight)
    before = float(weight.grad.square().sum())
    energy = keeper.project_gradients_(measure=True)
    assert energy is not None
    assert float(energy.before) == pytest.approx(before, rel=1e-5)
    assert float(energy.after) == pytest.approx(float(weight.grad.square().sum()), rel=1e-5)
    assert float(energy.after) < 0.8 * before
