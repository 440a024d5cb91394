"""Find, on the CPU, what would make a host wait for its GPU: numbers that Python asks for, sizes that hang on data."""

from __future__ import annotations

import traceback
from typing import Any

from typing_extensions import override

from nspo_lightning.compat.torch import DeviceWaits


class HostSyncs(DeviceWaits):
    """Record the operations inside a ``with`` block that would wait, with the lines that called them."""

    single_numbers = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    @override
    def on_wait(self, func: Any, reason: str) -> None:
        frames = traceback.extract_stack()[-9:-2]
        lines = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames]
        self.found.append(f"{func} {reason}, at {' > '.join(lines)}")
