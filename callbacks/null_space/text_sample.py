"""A little calibration text to see outputs on: which rows, and how a batch is cut into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.nullspace import ForwardCall

MOST_DOMAINS = 8
_MOST_ROWS = 16  # of the first batch
_LEAST_TOKENS = 4  # of a text that is cut short


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """Some calibration text, the same on all ranks.

    Attributes:
        rows: One row of every domain, to verify on.
        first: The first batch and those rows, whose outputs are remembered.
    """

    rows: Sequence[ForwardCall] = ()
    first: Sequence[ForwardCall] = ()

    @classmethod
    def of(cls, calls: Sequence[ForwardCall]) -> TextSample:
        """Choose from calibration batches (cross-rank synchronisation)."""
        # Batches of token ids are cut into single rows, so that outputs at all positions fit into memory.
        by_domain: dict[str, ForwardCall] = {}
        for call in calls:
            for row, domain in enumerate(call.domains or [""]):
                if domain not in by_domain and len(by_domain) < MOST_DOMAINS:
                    by_domain[domain] = _one_row(call, row)
        rows = list(by_domain.values())
        first = [_one_row(calls[0], row) for row in range(min(_cut_into(calls[0]), _MOST_ROWS))] if calls else []
        rows, first = ranks.broadcast_object((rows, first), 0)
        return cls(rows=rows, first=[*first, *rows[1:]])


def halved(call: ForwardCall) -> ForwardCall | None:
    """Return half of a call: of its rows, or of a single text's tokens; None where it can't be cut."""
    rows = _rows_of(call)
    if rows > 1:
        return _part(call, slice(rows // 2))
    values = _values_of(call)
    shapes = {value.shape for value in values if isinstance(value, Tensor)}
    if "input_ids" not in call.kwargs or len(shapes) != 1 or not all(isinstance(v, Tensor) for v in values):
        return None
    (shape,) = shapes
    if len(shape) != 2 or shape[1] < 2 * _LEAST_TOKENS:
        return None
    half = shape[1] // 2
    padded_left = call.mask is not None and int(call.mask[:, half:].sum()) > int(call.mask[:, :half].sum())
    part = slice(half, None) if padded_left else slice(half)
    return replace(
        call,
        kwargs={name: value[:, part] for name, value in call.kwargs.items()},
        mask=None if call.mask is None else call.mask[:, part],
    )


def _cut_into(call: ForwardCall) -> int:
    return _rows_of(call) if "input_ids" in call.kwargs else 1


def _values_of(call: ForwardCall) -> list[object]:
    return [*call.args, *call.kwargs.values(), *([] if call.mask is None else [call.mask])]


def _rows_of(call: ForwardCall) -> int:
    """Count the rows that a call can be cut into; 1 where its tensors do not share their first dimension."""
    values = _values_of(call)
    sizes = {value.shape[0] if isinstance(value, Tensor) and value.ndim > 1 else None for value in values}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size or 1


def _part(call: ForwardCall, rows: slice) -> ForwardCall:
    return replace(
        call,
        args=tuple(value[rows] for value in call.args),
        kwargs={name: value[rows] for name, value in call.kwargs.items()},
        mask=None if call.mask is None else call.mask[rows],
        domains=None if call.domains is None else list(call.domains[rows]),
    )


def _one_row(call: ForwardCall, row: int) -> ForwardCall:
    return _part(call, slice(row, row + 1)) if _cut_into(call) > 1 else call
