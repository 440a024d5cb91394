"""The promise, under whatever a user trains with: ||D U_k|| / ||D|| <= 1e-6 after optimizer steps."""

from __future__ import annotations

import pytest
import torch
from null_space_problems import Net, leak, projection, trainer

from nspo_lightning.callbacks import NullSpaceProjection

LEAK = 1e-6  # float32 rounding of A over some hundred directions


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def adam_l2(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (sgd, {}),
        (sgd, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}),
        (adamw, {}),
        (adamw, {"accumulate_grad_batches": 4}),
        (adamw, {"gradient_clip_val": 0.1}),
        (adamw, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
        (adamw, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 4}),
        (adam_l2, {}),
        (fused, {}),
    ],
)
def test_updates_stay_in_the_null_space(tmp_path, optimizer, options, precision):
    model, callback = Net(optimizer), projection()
    trainer(tmp_path, callback, precision=precision, **options).fit(model)
    assert leak(model, precision) <= LEAK
    assert max(callback.certificate().values()) <= LEAK


def test_a_quantised_optimizer(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Net(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2))
    try:
        trainer(tmp_path, projection()).fit(model)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit optimizer on this device: {error}")
    assert leak(model) <= LEAK


@pytest.mark.parametrize(
    "without", [{"project_displacement": False}, {"project_displacement": False, "project_initialization": False}]
)
def test_without_the_third_step_it_leaks(tmp_path, without):
    model, callback = Net(adamw), projection(**without)
    trainer(tmp_path, callback).fit(model)
    assert leak(model) > 1e-2
    assert max(callback.certificate().values()) == pytest.approx(leak(model), rel=1e-3)  # and the certificate says so


def test_plain_training_leaks(tmp_path):
    model = Net(adamw)
    trainer(tmp_path, projection(enabled=False)).fit(model)
    assert leak(model) > 0.1


def test_gradients_are_projected_before_they_are_clipped(tmp_path):
    seen = {}

    class Watching(Net):
        def on_before_optimizer_step(self, optimizer):
            gradient = self.first.down.weight.grad
            assert gradient is not None
            seen["gradient"] = gradient.clone()

    model, callback = Watching(adamw), projection()
    trainer(tmp_path, callback, max_steps=3, gradient_clip_val=1e-3).fit(model)
    assert callback.calibration is not None
    basis = callback.calibration.basis_of("first")
    assert seen["gradient"].norm() > 0
    assert (seen["gradient"] @ basis.vectors).norm() / seen["gradient"].norm() < LEAK


class Manual(Net):
    """Two optimizers, stepped by hand, one of them every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            if index and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [adamw(self.first.parameters()), sgd(self.second.parameters())]


def test_manual_optimization_with_two_optimizers(tmp_path):
    model, callback = Manual(), projection()
    trainer(tmp_path, callback, max_steps=40).fit(model)
    assert leak(model) <= LEAK
    assert set(callback.certificate()) == {"first", "second"}


def test_several_parameter_groups(tmp_path):
    def grouped(parameters):
        parameters = list(parameters)
        return torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1e-3}], lr=1e-2)

    model = Net(grouped)
    trainer(tmp_path, projection()).fit(model)
    assert leak(model) <= LEAK


def test_a_step_that_is_skipped_is_not_reprojected_twice_or_forgotten(tmp_path):
    """training_step returning None skips the optimizer; the weights must not move and the rest must hold."""

    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    model = Silent(adamw)
    trainer(tmp_path, projection()).fit(model)
    assert leak(model) <= LEAK


@pytest.mark.parametrize(
    ("variant", "inside"),
    [({"subspace": "null"}, True), ({"subspace": "random"}, False), ({"subspace": "protected"}, False)],
)
def test_subspaces_for_comparison(tmp_path, variant, inside):
    model, callback = Net(adamw), projection(**variant)
    trainer(tmp_path, callback).fit(model)
    assert (leak(model) <= LEAK) is inside
    assert max(callback.certificate().values()) <= LEAK  # each stays in the subspace it was given


def test_b_only_trains_nothing_but_b(tmp_path):
    model, callback = Net(adamw), projection(freeze_down=True)
    trainer(tmp_path, callback, max_steps=1).fit(model)
    first = model.first.down.weight.detach().clone()
    trainer(tmp_path, callback).fit(model)
    assert torch.equal(model.first.down.weight, first)
    assert leak(model) <= LEAK


def test_displacement_only_is_a_setting(tmp_path):
    model = Net(adamw)
    trainer(tmp_path, projection(project_gradients=False)).fit(model)
    assert leak(model) <= LEAK


def test_soft_form_certifies_a_bound(tmp_path):
    from null_space_problems import general_inputs

    model = Net(adamw)
    callback = NullSpaceProjection(form="soft", softness=1e-3, cache_dir=None)
    inputs: dict[str, torch.Tensor] = {}
    handle = model.first.register_forward_hook(lambda _, args, out: inputs.setdefault("out", out.detach()))
    with torch.no_grad():
        model(general_inputs())
    handle.remove()
    trainer(tmp_path, callback).fit(model)
    rows = general_inputs().double()
    change = (rows @ model.first.update.T).square().sum(1).mean().sqrt() / inputs["out"].square().sum(1).mean().sqrt()
    bound = callback.certificate()["first"]
    assert 0 < float(change) <= bound * 1.001
    assert bound < 0.3
