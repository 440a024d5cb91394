"""What an optimizer and its schedule were asked to do: a checkpoint overrules it, so a resume must ask the same.

Lightning restores both from the checkpoint, learning rates and all: another `lr` would change nothing, in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

_MOVES = frozenset({"last_epoch", "base_lrs", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"})
"""What a schedule's state says of its place; the rest is what it was asked."""
_HOW = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""What a group says of the way to compute, which may be another one on another machine."""


def optimizer_settings(
    make_optimizer: Callable[[Any], Optimizer],
    make_scheduler: Callable[[Optimizer], Any] | None,
    parameters: Iterable[nn.Parameter],
) -> dict[str, Any]:
    """Return the settings of an optimizer and its schedule by the names that users know, as plain values.

    Both are made for it, and thrown away: what runs has moved on, or been changed by a callback.

    Args:
        make_optimizer: Makes the optimizer of some parameters.
        make_scheduler: Makes its schedule; None = there is none.
        parameters: The parameters that train.
    """
    optimizer = make_optimizer(parameters)
    values: dict[str, Any] = {"model.optimizer": _class_of(optimizer)}
    groups = [{key: value for key, value in group.items() if key not in _HOW} for group in optimizer.param_groups]
    for number, group in enumerate(groups):
        name = "model.optimizer" if len(groups) == 1 else f"model.optimizer.group_{number}"
        values |= {f"{name}.{key}": value for key, value in group.items() if _is_plain(value)}
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    values["model.scheduler"] = None if scheduler is None else _class_of(scheduler)
    if scheduler is not None:
        values |= _flat(scheduler.state_dict(), "model.scheduler")
    return values


def _flat(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in state.items():
        if key in _MOVES:
            continue
        if isinstance(value, Mapping):
            values |= _flat(value, f"{name}.{key}")
        elif isinstance(value, list) and all(isinstance(inner, Mapping) for inner in value):  # SequentialLR's parts
            for number, inner in enumerate(value):
                values |= _flat(inner, f"{name}.{key}[{number}]")
        elif _is_plain(value):
            values[f"{name}.{key}"] = value
    return values


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _class_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
