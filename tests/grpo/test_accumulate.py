import pytest
import torch
from torch import nn

from nspo_lightning.grpo import accumulated_loss


def make_problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return net, torch.randn(12, 4).split(5)


def loss_of(net):
    return lambda x: net(x).square().sum()


def test_loss_and_gradients_equal_one_backward_pass():
    net, chunks = make_problem()
    expected = sum(loss_of(net)(x) for x in chunks)
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    loss = accumulated_loss(list(net.parameters()), chunks, loss_of(net))
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient)


def test_gradients_accumulate_over_backward_passes_as_usual():
    net, chunks = make_problem()
    for _ in range(2):
        accumulated_loss(list(net.parameters()), chunks, loss_of(net)).backward()
    twice = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sum(2 * loss_of(net)(x) for x in chunks).backward()
    for parameter, gradient in zip(net.parameters(), twice, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_graphs_live_one_at_a_time():
    net, chunks = make_problem()
    alive, most = set(), 0

    class Tracer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal most
            ctx.token = object()
            alive.add(id(ctx.token))
            most = max(most, len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            alive.discard(id(ctx.token))
            return g

    accumulated_loss(list(net.parameters()), chunks, lambda x: Tracer.apply(net(x)).square().sum())
    assert (most, len(alive)) == (1, 0)


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_unused_parameters_get_nothing():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loss = accumulated_loss([used, unused], [1.0, 2.0], lambda x: (used * x).sum())
    loss.backward()
    assert loss == 6
    assert gradient(used).tolist() == [3, 3]
    assert unused.grad is None


def test_a_loss_that_lost_its_graph_is_not_passed_over():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="does not require grad"):
        accumulated_loss([weight], [1.0, 2.0], lambda x: (weight.detach() if x == 2 else weight).sum() * x)


def test_loss_scale_saves_small_half_precision_gradients_and_changes_no_result():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    tiny = 1e-5  # squared it is below half precision's smallest number

    def loss_fn(x):
        return (weight * x).float().sum() * tiny

    chunks = [torch.full((4,), tiny, dtype=torch.float16)]
    accumulated_loss([weight], chunks, loss_fn).backward()
    assert gradient(weight).eq(0).all()
    weight.grad = None
    scale = 2.0**16
    (accumulated_loss([weight], chunks, loss_fn, loss_scale=scale) * scale).backward()
    torch.testing.assert_close(gradient(weight).float(), torch.full((4,), 1e-10 * scale), rtol=1e-2, atol=0)


def test_gradients_survive_an_autocast_forward_without_gradients():
    net, chunks = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            net(chunks[0])  # fills autocast's cache with casts that know no gradient
        loss = accumulated_loss(list(net.parameters()), chunks, loss_of(net))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_parameters_without_gradient_are_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        accumulated_loss([], [1], torch.tensor)
    with pytest.raises(ValueError, match="only parameters that require a gradient"):
        accumulated_loss([torch.ones(1)], [1], torch.tensor)
