"""torch: private names. Multi-tensor functions have no public form; schedulers keep what they compute from."""

from __future__ import annotations

from collections.abc import Sequence
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
