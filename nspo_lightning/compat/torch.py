"""torch: private names, a setting whose name has changed, and how much memory is free.

Multi-tensor functions have no public form; schedulers keep what they compute from; to see every operation takes a
dispatch mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

RunningNorm = _NormBase
"""What batch and instance normalisations of any dimension have in common: running statistics."""

_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Lists of learning rates that torch's schedulers compute later ones from."""


def version_of(tensor: Tensor) -> int:
    """Return a count of the changes in place that a tensor has seen; 0 for one that keeps no count."""
    return 0 if tensor.is_inference() else tensor._version


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """Return the free and all bytes of a CUDA device; None for others, where that is not known well enough.

    What torch's allocator holds and does not use is free.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors in place, in one launch where the device allows it."""
    torch._foreach_copy_(list(targets), list(sources))


def float32_backends() -> list[Any]:
    """Return what chooses how float32 products are computed, on a GPU and on the CPU."""
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


@contextmanager
def full_precision_products() -> Iterator[None]:
    """Compute float32 matrix products in float32, whatever the user has chosen; the choice is restored.

    TF32 (on a GPU) and bfloat16 (on some CPUs) products are off by 1e-3, and so would be all that is projected or
    summed with them.
    """
    matmul = float32_backends()
    if not all(hasattr(backend, "fp32_precision") for backend in matmul):  # before torch 2.9
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    before = [backend.fp32_precision for backend in matmul]
    try:
        for backend in matmul:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(matmul, before, strict=True):
            backend.fp32_precision = precision


def scale_scheduler_(scheduler: Any, factor: float) -> None:
    """Multiply all rates that a learning-rate scheduler computes with, those of the schedulers in it too."""
    state = vars(scheduler)
    for name in _RATES:
        if isinstance(values := state.get(name), list):
            setattr(scheduler, name, [value * factor for value in values])
    if isinstance(floor := state.get("eta_min"), float):
        scheduler.eta_min = floor * factor
    for inner in state.get("_schedulers", ()):  # of SequentialLR and ChainedScheduler
        scale_scheduler_(inner, factor)


_WAITS = {
    "_local_scalar_dense": "reads a number (`.item()`, `if tensor:`)",
    "is_nonzero": "reads a number (`if tensor:`)",
    "equal": "reads whether two tensors are equal",
    "nonzero": "counts what is not zero",
    "masked_select": "counts what a mask selects",
    "masked_scatter_backward": "counts what a mask selects",
    "bincount": "makes a shape of numbers",
    "unique_dim": "counts distinct rows",
    "unique_consecutive": "counts distinct entries",
    "_unique": "counts distinct entries",
    "_unique2": "counts distinct entries",
    "lift_fresh": "copies Python's numbers to the device",
}
_INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")


class DeviceWaitError(RuntimeError):
    """An operation after which the host must wait for the device."""


class DeviceWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees inside a ``with`` block, on any device, the operations whose result the host must wait for.

    Results read as numbers, shapes made of results, copies between devices. Not seen are CPU tensors that Python reads
    without an operation (`.tolist()`, `.numpy()`).

    Attributes:
        single_numbers: Whether one number that becomes a tensor on the CPU counts. There `x[0] = 1`, which waits on no
            device, looks like `torch.tensor(1, device=x.device)`, which does.
    """

    single_numbers = False

    def on_wait(self, func: Any, reason: str) -> None:
        """Do something about an operation, before it runs."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        reason = _reason_to_wait(func, args, kwargs)
        lifted = args[0] if func.overloadpacket.__name__ == "lift_fresh" else None
        is_number = lifted is not None and lifted.ndim == 0 and lifted.device.type == "cpu"
        if reason and (self.single_numbers or not is_number):
            self.on_wait(func, reason)
        return func(*args, **kwargs)


class NoDeviceWaits(DeviceWaits):
    """Raises `DeviceWaitError` at the first one.

    Libraries that leave checks out while a CUDA graph is captured are told that one is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._asked = torch.cuda.is_current_stream_capturing

    def __enter__(self) -> Any:
        """Begin to watch."""
        torch.cuda.is_current_stream_capturing = lambda: True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        torch.cuda.is_current_stream_capturing = self._asked
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @override
    def on_wait(self, func: Any, reason: str) -> None:
        raise DeviceWaitError(f"{func} {reason}")


def _reason_to_wait(func: Any, args: Any, kwargs: Any) -> str:
    """Say why the host must wait for an operation; "" if it need not."""
    name = func.overloadpacket.__name__
    if name in _INDEXED and any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1]):
        return "counts what a mask selects"
    if name == "repeat_interleave" and func._overloadname != "self_int" and kwargs.get("output_size") is None:
        return "makes a shape of numbers"
    if name in {"_to_copy", "copy_"}:
        target = kwargs.get("device") if name == "_to_copy" else args[0].device
        source = args[0 if name == "_to_copy" else 1]
        if target is not None and isinstance(source, Tensor) and torch.device(target).type != source.device.type:
            return "copies between devices"
    return _WAITS.get(name, "")
