"""What rollouts, experience and metrics are made of: frozen dataclasses with tensors in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=Any)


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return the same dataclass with each of its tensors changed; other fields stay as they are."""
    changed = {name: change(value) for name, value in vars(record).items() if isinstance(value, Tensor)}
    result: Record = replace(record, **changed)
    return result
