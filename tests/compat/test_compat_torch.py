"""Names of torch that no promise covers. A failure here says which one is gone and where it was used."""

from __future__ import annotations

import pytest
import torch
from host_syncs import HostSyncs
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


MASK = torch.tensor([False, False, True, True])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool((x > 1).any()),
        lambda x: torch.is_nonzero(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[MASK],
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.masked_select(MASK),
        lambda x: x.index_put((MASK,), torch.zeros(1)),
        lambda x: x.index_put_((MASK,), x.new_zeros(1)),
        lambda x: x.zero_().masked_scatter(MASK, torch.ones(2, requires_grad=True)).sum().backward(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.to("meta"),
    ],
)
def test_operations_that_wait_are_seen_by_what_refuses_and_by_what_records(wait):
    with pytest.raises(compat.DeviceWaitError, match="aten"), compat.NoDeviceWaits():
        wait(torch.arange(4.0))
    with HostSyncs() as syncs:
        wait(torch.arange(4.0))
    assert syncs.found


def test_a_number_alone_counts_where_no_library_s_own_code_is_watched():
    with compat.NoDeviceWaits():
        torch.zeros(2)[0] = 1
    with HostSyncs() as syncs:
        torch.tensor(1.0)
    assert syncs.found


def test_operations_that_do_not_wait_pass_both():
    asked = torch.cuda.is_current_stream_capturing
    syncs, places = HostSyncs(), torch.tensor([1, 2])
    for watch in (compat.NoDeviceWaits(), syncs):
        x = torch.arange(4.0, requires_grad=True)
        with watch:
            x.detach().repeat_interleave(2)
            x.detach().to(torch.float64)[places] += 1
            x[places].where(MASK[:2], 0.0).repeat_interleave(MASK[2:].long(), output_size=2).logsumexp(0).backward()
            told = torch.cuda.is_current_stream_capturing is not asked
        assert told is (watch is not syncs), "libraries leave checks out while they are captured, and only then"
    assert not syncs.found
    assert torch.cuda.is_current_stream_capturing is asked
