"""Names of torch that no promise covers. A failure here says which one is gone and where it was used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nspo_lightning.compat import torch as compat


def test_multi_tensor_functions():
    tensors = [torch.full((3,), 3.0), torch.full((2, 2), 6.0)]
    compat.copy_all_(tensors, [torch.zeros(3), torch.ones(2, 2)])
    assert torch.equal(tensors[0], torch.zeros(3))
    assert torch.equal(tensors[1], torch.ones(2, 2))


def test_tensors_count_changes_in_place():
    tensor = torch.zeros(2)
    before = compat.version_of(tensor)
    assert compat.version_of(tensor + 1) == 0
    tensor.add_(1)
    assert compat.version_of(tensor) > before, "see Tensor._version"
    with torch.inference_mode():
        assert compat.version_of(torch.zeros(1)) == 0


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm3d, nn.LazyBatchNorm1d])
def test_normalisations_with_running_statistics_have_one_class(kind):
    assert issubclass(kind, compat.RunningNorm), "see torch/nn/modules/batchnorm.py"
    assert not issubclass(nn.LayerNorm, compat.RunningNorm)


def constant(optimizer):
    return lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3)


@pytest.mark.parametrize(
    "make",
    [
        constant,
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.01),
        lambda o: lr_scheduler.SequentialLR(o, [constant(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    ],
)
def test_every_later_rate_of_a_scheduler_is_scaled(make):
    def rates(scaled_at):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        scheduler, found = make(optimizer), []
        for step in range(8):
            if step == scaled_at:
                for group in optimizer.param_groups:
                    group.update({k: group[k] / 2 for k in ("lr", "initial_lr") if k in group})
                compat.scale_scheduler_(scheduler, 0.5)
            optimizer.step()
            scheduler.step()
            found.append(scheduler.get_last_lr()[0])
        return found

    message = f"torch {torch.__version__}: see `_last_lr`, `_schedulers` and the lists of rates in lr_scheduler.py"
    expected = [rate if step < 4 else rate / 2 for step, rate in enumerate(rates(None))]
    assert rates(4) == pytest.approx(expected), message


def test_operations_that_wait_are_seen():
    x = torch.arange(4.0)
    waits = [
        lambda: x[0].item(),
        lambda: bool((x > 1).any()),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.unique(),
        lambda: torch.bincount(x.long()),
        lambda: x.repeat_interleave(x.long()),
        lambda: x.masked_select(x > 1),
        lambda: x.index_put_((x > 1,), torch.tensor(0.0)),
        lambda: x.to("meta"),
    ]
    for wait in waits:
        with pytest.raises(compat.DeviceWaitError, match="aten"), compat.NoDeviceWaits():
            wait()
    asked = torch.cuda.is_current_stream_capturing
    with compat.NoDeviceWaits():
        x.repeat_interleave(2)
        x.to(torch.float64)[torch.tensor([1, 2])] += 1
        assert torch.cuda.is_current_stream_capturing(), "libraries leave checks out while they are captured"
    assert torch.cuda.is_current_stream_capturing is asked
