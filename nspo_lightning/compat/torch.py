"""torch: private names, and a setting whose name has changed.

Multi-tensor functions have no public form; schedulers keep what they compute from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

RunningNorm = _NormBase
"""What batch and instance normalisations of any dimension have in common: running statistics."""

_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Lists of learning rates that torch's schedulers compute later ones from."""


def version_of(tensor: Tensor) -> int:
    """Return a count of the changes in place that a tensor has seen; 0 for one that keeps no count."""
    return 0 if tensor.is_inference() else tensor._version


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
