"""A little calibration text to see outputs on: which rows, and how a batch is cut into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.nullspace import ForwardCall
from nspo_lightning.nullspace.domains import is_apart

_MOST_DOMAINS = 8
_MOST_KINDS = 4
_MOST_ROWS = 16  # of the first batch
_LEAST_TOKENS = 4  # of a text that is cut short


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """Some calibration text, the same on all ranks.

    Attributes:
        rows: To verify on: of the first domains one row each; the most padded row; one of other batches, and of each
            kind of call. A call that can't be cut is kept whole.
        first: The first batch and those rows, whose outputs are remembered.
    """

    rows: Sequence[ForwardCall] = ()
    first: Sequence[ForwardCall] = ()

    @classmethod
    def of(cls, calls: Sequence[ForwardCall]) -> TextSample:
        """Choose from the calibration batches whose outputs must stay (cross-rank synchronisation)."""
        calls = [call for call in calls if not any(map(is_apart, call.domains or ()))]
        if not calls:
            nothing: tuple[list[ForwardCall], list[ForwardCall]] = ([], [])
            rows, first = ranks.broadcast_object(nothing, 0)
            return cls(rows=rows, first=first)
        chosen: dict[object, ForwardCall] = {}
        for number, call in enumerate(calls):
            for row, domain in enumerate(call.domains or [""]):
                if len(chosen) < _MOST_DOMAINS:
                    chosen.setdefault(("domain", domain), _one_row(call, row))
            if len(chosen) < _MOST_DOMAINS + _MOST_KINDS:
                chosen.setdefault(_kind(call), _one_row(call, 0))
            if number in {len(calls) // 2, len(calls) - 1}:
                chosen[number] = _one_row(call, _rows_of(call) - 1)
        if (padded := _most_padded(calls)) is not None:
            chosen["padded"] = padded
        first = [_one_row(calls[0], row) for row in range(min(_cut_into(calls[0]), _MOST_ROWS))]
        rows, first = ranks.broadcast_object((list(chosen.values()), first), 0)
        return cls(rows=rows, first=[*first, *rows[1:]])


def _kind(call: ForwardCall) -> object:
    """Return what makes a call run another path than others: which arguments there are, and of what form."""
    parts = [*enumerate(call.args), *sorted(call.kwargs.items())]
    forms = [(n, (v.ndim, v.dtype) if isinstance(v, Tensor) else repr(type(v))) for n, v in parts]
    return ("kind", tuple(map(str, forms)), call.mask is None)


def _most_padded(calls: Sequence[ForwardCall]) -> ForwardCall | None:
    """Return the row with the largest share of positions that don't count, None where all count."""
    best: tuple[float, ForwardCall] | None = None
    for call in calls:
        if call.mask is None or call.mask.ndim < 2 or _rows_of(call) < 2:
            continue
        share = call.mask.ne(0).flatten(1).float().mean(1)
        if float(share.min()) < min(1.0, best[0] if best else 1.0):
            best = (float(share.min()), _one_row(call, int(share.argmin())))
    return None if best is None else best[1]


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
        starts=None if call.starts is None else call.starts[:, part],
    )


def _cut_into(call: ForwardCall) -> int:
    return _rows_of(call) if "input_ids" in call.kwargs else 1


def _values_of(call: ForwardCall) -> list[object]:
    return [*call.args, *call.kwargs.values(), *([] if call.mask is None else [call.mask])]


def _rows_of(call: ForwardCall) -> int:
    """Count the rows that a call can be cut into; 1 where its tensors do not share their first dimension."""
    values = _values_of(call)
    if "input_ids" not in call.kwargs and (call.kwargs or len(call.args) != 1):
        return 1  # who knows which of several arguments have a row for each text
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
        starts=None if call.starts is None else call.starts[rows],
    )


def _one_row(call: ForwardCall, row: int) -> ForwardCall:
    return _part(call, slice(row, row + 1)) if _cut_into(call) > 1 else call
