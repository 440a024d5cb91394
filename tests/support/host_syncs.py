"""Find, on the CPU, what would make a host wait for its GPU: numbers that Python asks for, sizes that hang on data."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_WAITING = {
    *(_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero),
    *(_aten.nonzero, _aten.masked_select, _aten.masked_scatter_backward, _aten.bincount),
    *(_aten._unique2, _aten.unique_dim, _aten.unique_consecutive),
    _aten.lift_fresh,  # a tensor made of Python's numbers: a copy to the device, which waits for it
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index}


class HostSyncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the operations inside a ``with`` block that would wait, with the lines that called them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._waits(func, args, kwargs):
            lines = [
                f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_stack()[-8:-1]
            ]
            self.found.append(f"{func} at {' > '.join(lines)}")
        return func(*args, **kwargs)

    @staticmethod
    def _waits(func: Any, args: Any, kwargs: Any) -> bool:
        packet = func._overloadpacket
        if packet in _INDEXING:  # by a mask: its True entries are counted first
            return any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1])
        if packet is _aten.repeat_interleave:
            return kwargs.get("output_size") is None
        return packet in _WAITING
