"""From whatever a dataloader yields to forward calls with a mask: the only place that knows about batch layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from nspo_lightning.nullspace import ForwardCall

BatchToInputs = Callable[[Any], tuple[Any, Tensor | None]]
"""From a batch to (forward arguments, mask); arguments are a tensor, a tuple or a dict; mask True = counts."""


def to_call(batch: Any, batch_to_inputs: BatchToInputs | None) -> ForwardCall:
    """Return a calibration batch as a forward call on the CPU.

    Args:
        batch: A dict with ``input_ids`` and ``attention_mask`` of shape ``(batch, seq)`` and optionally ``domain``, a
            list of names, and ``answer_starts``, shape ``(batch, seq)``, True = start of an answer; or a tensor; or a
            tuple whose first entry is the input.
        batch_to_inputs: The user's own layout.

    Raises:
        TypeError: If the batch has none of the known layouts.
    """
    domains = batch.get("domain") if isinstance(batch, Mapping) else None
    starts = batch.get("answer_starts") if isinstance(batch, Mapping) else None
    if batch_to_inputs is not None:
        inputs, mask = batch_to_inputs(batch)
    elif isinstance(batch, Mapping) and "input_ids" in batch:
        mask = batch.get("attention_mask")
        inputs = {"input_ids": batch["input_ids"]} | ({} if mask is None else {"attention_mask": mask})
    elif isinstance(batch, Tensor):
        inputs, mask = batch, None
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        inputs, mask = batch[0], None
    else:
        got = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            got = f"a dict with the keys {sorted(map(str, batch))}"
        raise TypeError(
            "A calibration batch must be a dict with `input_ids` (and `attention_mask`), a tensor, or a tuple that "
            f"starts with the input tensor, got {got}. Pass `batch_to_inputs`, a function from a batch to "
            "(forward arguments, mask)."
        )
    if isinstance(inputs, Mapping):
        call = ForwardCall(kwargs=inputs, mask=mask, domains=domains, starts=starts)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        call = ForwardCall(args=args, mask=mask, domains=domains, starts=starts)
    return move_call(call, torch.device("cpu"))


def move_call(call: ForwardCall, device: torch.device) -> ForwardCall:
    """Return the call with its tensors on a device."""
    moved = move_data_to_device((call.args, dict(call.kwargs), call.mask, call.starts), device)
    args, kwargs, mask, starts = moved
    return ForwardCall(args=args, kwargs=kwargs, mask=mask, domains=call.domains, starts=starts)


def tensors_of(call: ForwardCall) -> Iterable[Tensor]:
    """Yield the tensors of a call, for the data fingerprint."""
    yield from (v for v in (*call.args, *call.kwargs.values(), call.mask, call.starts) if isinstance(v, Tensor))


def floating_tensors(output: Any) -> list[Tensor]:
    """Return all floating-point tensors in what a model gives: a tensor, or tuples, dicts and dataclasses of them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [vars(output)[field.name] for field in fields(output)]
    else:
        parts = []
    return [found for part in parts for found in floating_tensors(part)]
