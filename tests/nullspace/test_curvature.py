"""The second-order KL: against the Fisher information itself, against the KL that it foretells, and what it leaves."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from nspo_lightning.nullspace.curvature import LayerCurvature, Moment, RunningMoment, check_layers, measure_curvature
from nspo_lightning.nullspace.layers import ProtectedLayer, plan_layers

WIDTH, LABELS = 6, 5


class Net(nn.Module):
    """Two layers, the second on what the first gives, behind embeddings; the second gives logits."""

    config = SimpleNamespace(model_type="none")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, WIDTH)
        self.first = nn.Linear(WIDTH, 8)
        self.second = nn.Linear(8, LABELS)
        self.unused = nn.Linear(3, 3)

    def forward(self, input_ids):
        return self.second(torch.tanh(self.first(self.embed(input_ids))))

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return {}


def adapted(targets=("first", "second"), **options):
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **options))
    return model.train(), plan_layers(model, resumed=True).layers


def batches(count=6, tokens=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(9, (2, tokens // 2), generator=generator)} for _ in range(count)]


def drawn_loss(model, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def loss(batch):
        logits = model(input_ids=batch["input_ids"]).flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)

    return loss


def fill_up(model, size, seed):
    """Give every B a value: the update is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def mean_kl(model, text):
    ids = torch.cat([batch["input_ids"] for batch in text])
    with torch.no_grad():
        moved = model(input_ids=ids).double().log_softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=ids).double().log_softmax(-1)
    return float((base.exp() * (base - moved)).sum(-1).mean())


def test_the_sums_are_those_of_the_fisher_information():
    """Of the last layer the gradient is known: what is predicted minus what was drawn."""
    model, layers = adapted()
    found = measure_curvature(model, layers, batches(), drawn_loss(model), width_limit=64)
    assert found.tokens == 300
    generator = torch.Generator().manual_seed(0)
    total, energy, moment = torch.zeros(LABELS, LABELS), torch.zeros(()), torch.zeros(8, 8)
    for batch in batches():
        inputs = torch.tanh(model.get_base_model().first.base_layer(model.get_base_model().embed(batch["input_ids"])))
        inputs = inputs.detach().flatten(0, 1)
        probabilities = model.get_base_model().second.base_layer(inputs).softmax(-1).detach()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        gradient = probabilities - nn.functional.one_hot(labels, LABELS)
        total = total + gradient.T @ gradient
        square = gradient.square().sum(1, keepdim=True)
        moment, energy = moment + (square * inputs).T @ inputs, energy + square.sum()
    last = found.layers[1]
    assert torch.allclose(last.inputs.factor, moment / energy, atol=1e-5)
    assert torch.allclose(last.outputs.factor / last.outputs.factor.trace(), total / total.trace(), atol=1e-5)


def test_it_foretells_the_kl_of_small_updates():
    """The Kronecker form has the Fisher information's trace, so it is right on average over all directions."""
    model, layers = adapted()
    text = batches(40)
    found = measure_curvature(model, layers, text, drawn_loss(model), width_limit=64)
    ratios = []
    for seed in range(60):
        fill_up(model, 0.03, seed)
        ratios.append(mean_kl(model, text) / float(found.pull()[0]))
    assert torch.tensor(ratios).mean() == pytest.approx(1.0, abs=0.15)
    assert min(ratios) > 0.2
    assert max(ratios) < 5


def test_the_gradient_is_that_of_the_second_order_kl():
    model, layers = adapted()
    found = measure_curvature(model, layers, batches(), drawn_loss(model), width_limit=64)
    fill_up(model, 0.5, 3)
    total = torch.zeros(())
    for of in found.layers:
        assert of.layer.output is not None
        update = of.layer.scale * (of.layer.output @ of.layer.matrix)
        total = total + (of.outputs.factor @ update @ of.inputs.factor * update).sum() / 2
    kl, gradients = found.pull()
    assert float(kl) == pytest.approx(total.item(), rel=1e-5)
    for parameter, expected in zip(gradients, torch.autograd.grad(total, list(gradients)), strict=True):
        assert torch.allclose(gradients[parameter], expected, rtol=1e-4, atol=1e-7)
    layers[0].matrix.requires_grad_(False)  # as with `freeze_down`
    assert len(found.pull()[1]) == 3


def test_it_is_the_bases_whatever_the_adapter_is_and_leaves_the_model_as_it_was():
    model, layers = adapted(lora_dropout=0.5)
    fresh = measure_curvature(model, layers, batches(), drawn_loss(model), width_limit=64)
    fill_up(model, 1.0, 5)
    layers[0].matrix.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    again = measure_curvature(model, layers, batches(), drawn_loss(model), width_limit=64)
    for one, other in zip(fresh.layers, again.layers, strict=True):
        assert torch.equal(one.inputs.factor, other.inputs.factor)
        assert torch.equal(one.outputs.factor, other.outputs.factor)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not layers[0].matrix.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 40), limit=st.integers(1, 40), rows=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_moment_is_whole_up_to_the_limit_and_has_its_trace_beyond(width, limit, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    exact = x.T @ x / rows
    running = RunningMoment(width, limit, seed)
    for part in x.split(7):
        running.update(part)
    found = running.take(rows, torch.device("cpu"))
    dense = found.times(torch.eye(width))
    assert (found.values is None) is (width <= limit)
    if found.values is None:
        assert torch.allclose(dense, exact, rtol=1e-4, atol=1e-5)
        return
    assert found.factor.shape[0] <= limit
    assert torch.allclose(dense, dense.T, atol=1e-5)
    assert float(torch.linalg.eigvalsh(dense.double()).min()) >= -1e-4 * found.trace()
    assert found.trace() == pytest.approx(float(exact.trace()), rel=1e-3)
    assert float(dense.trace()) == pytest.approx(found.trace(), rel=1e-3)
    if rows < limit:  # all of it fits
        assert torch.allclose(dense, exact, rtol=1e-2, atol=1e-3 * float(exact.trace()))


@pytest.mark.parametrize(("width", "limit"), [(96, 64), (128, 32)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_pull_by_a_part_of_the_moment_does_not_escape_into_the_rest(width, limit, decay):
    """What the kept directions do not see must not be free: an update that was pulled lies where they see least."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * width, width, generator=generator) * torch.arange(1, width + 1) ** (-decay / 2)
    exact = (x.T @ x / len(x)).double()
    running = RunningMoment(width, limit, 3)
    running.update(x)
    kept = running.take(len(x), torch.device("cpu")).times(torch.eye(width)).double()
    wanted = torch.randn(3, width, generator=generator).double()
    mean = exact.trace() / width
    costs = {}
    for name, moment in {"kept": kept, "exact": exact}.items():
        pulled = torch.linalg.solve(torch.eye(width).double() + 10 * moment / mean, wanted.T).T
        costs[name] = float(((pulled @ exact) * pulled).sum())
        if name == "kept":
            assert costs[name] / float(((pulled @ kept) * pulled).sum()) == pytest.approx(1.0, abs=0.6)
    assert costs["kept"] < 2 * costs["exact"]


def test_what_has_no_second_order_kl_is_refused_by_name():
    up, down = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(4, 2))
    experts = ProtectedLayer(name="moe", module=nn.Linear(2, 2), kind="lora", matrix=down, output=up, experts=2)
    with pytest.raises(ValueError, match="moe are weights of a mixture's experts.*by name"):
        check_layers([experts])
    model, layers = adapted(targets=("first", "unused"))
    with pytest.raises(ValueError, match=r"No finite gradient of the text reaches .*unused"):
        measure_curvature(model, layers, batches(), drawn_loss(model), width_limit=64)


def test_numbers_that_are_not_finite_are_refused():
    model, layers = adapted()
    with torch.no_grad():
        model.get_base_model().second.base_layer.weight[0, 0] = float("nan")

    def loss(batch):
        logits = model(input_ids=batch["input_ids"]).flatten(0, 1)
        return logits.sum(), len(logits)

    with pytest.raises(ValueError, match=r"No finite gradient of the text reaches .*first"):
        measure_curvature(model, layers, batches(), loss, width_limit=64)


class Mixing(nn.Module):
    """One layer whose outputs all later positions read, as attention does with its values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.values = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, LABELS, bias=False)

    def forward(self, ids):
        read = self.values(self.embed(ids)).cumsum(1)
        return read / torch.arange(1, ids.shape[1] + 1)[:, None] ** 0.5


def test_sums_over_positions_are_in_the_trace():
    """E[|sum_t g_t x_t^T|^2], by the whole gradient of each text."""
    model = Mixing()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "values.weight")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(9, (40, 12), generator=generator)
    labels = torch.multinomial(model(ids).detach().softmax(-1).flatten(0, 1), 1, generator=generator).view(40, 12)

    def loss(batch):
        logits = model(batch["ids"])
        return nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="sum"), batch["labels"].numel()

    layers = plan_layers(model).layers
    parts = [{"ids": ids[n : n + 8], "labels": labels[n : n + 8]} for n in range(0, 40, 8)]
    (found,) = measure_curvature(model, layers, parts, loss, width_limit=64).layers
    total = 0.0
    for n in range(40):
        (gradient,) = torch.autograd.grad(
            loss({"ids": ids[n : n + 1], "labels": labels[n : n + 1]})[0], model.values.weight
        )
        total += float(gradient.square().sum())
    assert found.inputs.trace() * found.outputs.trace() == pytest.approx(total / 480, rel=1e-4)


def test_a_layer_without_update_pulls_nowhere():
    model, layers = adapted()
    found = measure_curvature(model, layers, batches(), drawn_loss(model), width_limit=64)
    kl, gradients = found.pull()
    assert float(kl) == 0
    assert not any(gradient.any() for gradient in gradients.values())
    one = LayerCurvature(layers[0], Moment(torch.eye(WIDTH)), Moment(torch.eye(8)))
    assert all(gradient.shape == parameter.shape for parameter, gradient in one.pull()[1].items())


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_weights_are_pulled_back_to_where_they_were(transposed):
    model = Net()
    if transposed:
        weight = model.second.weight.detach().T.clone()
        model.second = Conv1D(LABELS, 8)
        model.second.weight.data.copy_(weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("first.weight", "second.weight"))
    base = copy.deepcopy(model)
    text = batches(40)
    found = measure_curvature(model, plan_layers(model).layers, text, drawn_loss(model), width_limit=64)
    assert found.held_bytes() == 4 * (2 * 8 * 8 + WIDTH**2 + LABELS**2 + 8 * WIDTH + 8 * LABELS)
    ids = torch.cat([batch["input_ids"] for batch in text])
    before = base(ids).double().log_softmax(-1).detach()
    generator, ratios = torch.Generator().manual_seed(0), []
    for _ in range(60):
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for of in found.layers:
                of.layer.matrix.add_(torch.randn(of.layer.matrix.shape, generator=generator), alpha=0.03)
            now = model(ids).double().log_softmax(-1)
        ratios.append(float((before.exp() * (before - now)).sum(-1).mean()) / float(found.pull()[0]))
    assert torch.tensor(ratios).mean() == pytest.approx(1.0, abs=0.15)
    weights = {of.layer.matrix: of.layer for of in found.layers}
    total = torch.zeros(())
    for (weight, layer), of in zip(weights.items(), found.layers, strict=True):
        assert of.start is not None
        update = layer.rows(weight - of.start)
        total = total + (of.outputs.factor @ update @ of.inputs.factor * update).sum() / 2
    for weight, expected in zip(weights, torch.autograd.grad(total, list(weights)), strict=True):
        assert torch.allclose(found.pull()[1][weight], expected, rtol=1e-4, atol=1e-6)
