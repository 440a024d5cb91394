"""Output gradients of the benchmark: against autograd by hand, curvlinops' K-FAC where it is installed, and real KL."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS, VOCABULARY = 24, 5


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("output_gradients")
    sys.modules.pop("output_gradients", None)


class Net(nn.Module):
    """One row a text, or with ``mixes`` positions that see those before them, as attention does."""

    def __init__(self, mixes=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, 6).requires_grad_(False)
        self.first, self.last = nn.Linear(6, 4, bias=False), nn.Linear(4, VOCABULARY, bias=False)
        self.mixes = mixes

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.first(self.embed(input_ids)))
        if self.mixes:
            x = x.cumsum(1)
        return SimpleNamespace(logits=3 * self.last(x))

    def logits_of(self, rows):
        return 3 * self.last(torch.tanh(self.first(rows)))


def batch_of(ids, mask=None):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def test_sums_are_those_of_autograd_text_by_text(bench):
    """Positions that a mask leaves out, and a text's later tokens that its earlier ones reach, count as they should."""
    net = Net(mixes=True)
    ids = torch.randint(0, ROWS, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    labels = torch.arange(int(mask.sum())) % VOCABULARY
    found = bench.two_sided(net, {"first": net.first}, [batch_of(ids, mask)], lambda logits: labels)["first"]
    inputs, gradients, taken = [], [], 0
    for row, count in zip(ids, mask.sum(1).tolist(), strict=True):
        x = net.embed(row[:count])
        y = net.first(x).detach().requires_grad_()
        logits = 3 * net.last(torch.tanh(y).cumsum(0))
        logs = logits.log_softmax(-1)
        loss = -sum(logs[i, labels[taken + i]] for i in range(count))
        (gradient,) = torch.autograd.grad(loss, y)
        inputs.append(x)
        gradients.append(gradient)
        taken += count
    x, g = torch.cat(inputs).double(), torch.cat(gradients).double()
    c_found, g_found = found.moments()
    torch.testing.assert_close(c_found, x.T @ x / len(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(g_found, g.T @ g / len(g), atol=1e-6, rtol=1e-5)


def drawn(bench, net, repeats=400):
    ids = torch.arange(ROWS)[:, None].repeat(repeats, 1)
    modules = {"first": net.first, "last": net.last}
    return {n: of.moments() for n, of in bench.two_sided(net, modules, [batch_of(ids)], bench.drawn_labels(0)).items()}


def test_it_is_the_k_fac_of_curvlinops(bench):
    kfac = pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch").KFACLinearOperator

    class Flat(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            self.first, self.last = net.first, net.last

        def forward(self, rows):
            return self.net.logits_of(rows)

    net = Net()
    data = [(net.embed.weight.detach(), torch.zeros(ROWS, dtype=torch.long))]
    weights = [net.first.weight, net.last.weight]
    loss = nn.CrossEntropyLoss(reduction="sum")
    found = kfac(Flat(net), loss, weights, data, fisher_type="type-2", check_deterministic=False)
    found.compute_kronecker_factors()
    theirs = found.state_dict()
    for name, (c, g) in drawn(bench, net).items():
        (key,) = (key for key in theirs["input_covariances"] if key.endswith(name))
        torch.testing.assert_close(c, theirs["input_covariances"][key].double(), atol=1e-5, rtol=1e-4)
        exact = theirs["gradient_covariances"][key].double() / ROWS
        assert float((g - exact).norm() / exact.norm()) < 0.05


def test_it_predicts_the_kl_of_a_small_update(bench):
    """Tr(G D C D^T) / 2 is that of K-FAC, which takes inputs and gradients for independent: right within a factor."""
    net, ids = Net(), torch.arange(ROWS)[:, None]
    moments = drawn(bench, net)
    before = net(ids).logits.log_softmax(-1).detach()
    ratios = []
    for seed in range(6):
        for name, (c, g) in moments.items():
            weight = getattr(net, name).weight
            d = 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                weight += d
                after = net(ids).logits.log_softmax(-1)
                weight -= d
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            ratios.append(float(((g @ d.double() @ c) * d).sum() / 2) / kl)
    assert all(0.4 < ratio < 2.5 for ratio in ratios)


def test_a_step_confined_to_cheap_directions_costs_less_for_its_gain(bench):
    """Diagonal sides, where what should come out is plain: outputs 0 and inputs 0 are dear, 1 cheap."""
    c = torch.diag(torch.tensor([1.0, 1e-3, 1e-3])).double()
    rows = torch.tensor([[[1.0, 1.0, 0.0]]] * 2).double()
    safety = (rows, rows)
    found = bench.harms((c, c), (c, c), safety, safety)
    assert found["none"] == pytest.approx(1.0)
    assert found["inputs"] == pytest.approx(found["outputs"])
    assert found["inputs"] < 0.5
    assert found["inputs and outputs"] == pytest.approx(found["inputs"] * found["outputs"])
    assert found["inputs and outputs"] < found["inputs, or else outputs"]
