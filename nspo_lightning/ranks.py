"""Collective operations over the processes of a run; each is a no-op in a single process. Torch only."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks (cross-rank synchronisation), in place where the backend allows it."""
    if world_size() > 1:
        work = _on_backend_device(tensor)
        dist.all_reduce(work)
        return work.to(tensor.device)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, in rank order (cross-rank synchronisation; small picklable values only)."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def broadcast_object(value: T, source: int) -> T:
    """Return the source rank's value (cross-rank synchronisation; small picklable values only)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def broadcast_tensor(tensor: Tensor, source: int) -> Tensor:
    """Return the source rank's tensor; all ranks pass one of the same shape and dtype (cross-rank synchronisation)."""
    if world_size() == 1:
        return tensor
    work = _on_backend_device(tensor).contiguous()
    dist.broadcast(work, src=source)
    return work.to(tensor.device)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank (cross-rank synchronisation): all ranks then decide alike."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag))) > 0)


def any_nonzero(tensor: Tensor) -> bool:
    """Return whether any entry is not zero, NaN included; of a sharded tensor on any rank (cross-rank synchronisation).

    False for a tensor on the meta device, which has no entries.
    """
    plain = tensor.detach()
    if plain.device.type == "meta":
        return False
    local = local_part(plain)
    return bool(local.any()) if local is plain else any_rank(bool(local.any()))


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor (a DTensor, under FSDP2), any other tensor as it is."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.to_local()
    return tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together (cross-rank synchronisation), any other tensor as it is."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
    return tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, the same on all ranks, cut as another one is; as it is where that one is not sharded."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(like, DTensor):
            return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def reshard(model: nn.Module) -> None:
    """Put FSDP2's sharded parameters back in place after forwards without a backward; other modules are left alone.

    The outermost sharded modules keep their gathered weights after a forward, waiting for a backward that validation
    and calibration never run; whoever looks up ``module.weight`` then gets a copy that is thrown away.
    """
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@runtime_checkable
class RaisedTogether(Protocol):
    """An exception that says whether all ranks raise it at the same moment."""

    raised_on_all_ranks: bool


def raised_on_all_ranks(error: BaseException) -> bool:
    """Return whether an exception is known to be raised on every rank, which may then go on together."""
    return isinstance(error, RaisedTogether) and error.raised_on_all_ranks


def _on_backend_device(tensor: Tensor) -> Tensor:
    # NCCL reduces on the GPU only; the Gram of an offloaded layer may be on the CPU.
    if dist.get_backend() == "nccl" and tensor.device.type != "cuda":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor
