"""What a process holds while it trains: memory, file handles, threads, tensors."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback


@dataclass(frozen=True)
class Held:
    """What the process holds after an update.

    Attributes:
        update: The batch's number.
        memory_mb: Resident memory.
        handles: Open files, sockets and pipes.
        threads: Threads, torch's and the logger's among them.
        tensors: Tensors that Python knows of, -1 if they were not counted.
    """

    update: int
    memory_mb: float
    handles: int
    threads: int
    tensors: int = -1


def held(update: int, count_tensors: bool = False) -> Held:
    """Look at this process (Linux).

    Args:
        update: The batch's number.
        count_tensors: Also count tensors, which walks over all objects.

    Returns:
        What it holds.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = (
        sum(type(thing).__name__ in {"Tensor", "Parameter"} for thing in gc.get_objects()) if count_tensors else -1
    )
    return Held(
        update,
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        tensors,
    )


class Watch(Callback):
    """Look after each batch; the class keeps it, so that who runs the command line finds it."""

    seen: ClassVar[list[Held]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look."""
        update = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.seen.append(held(update, count_tensors=update % 10 == 0))


def slope(seen: list[Held], name: str) -> float:
    """Fit a line through the second half.

    Args:
        seen: All updates.
        name: Of the attribute.

    Returns:
        Its growth an update.
    """
    half = [one for one in seen[len(seen) // 2 :] if getattr(one, name) >= 0]
    return float(np.polyfit([one.update for one in half], [getattr(one, name) for one in half], 1)[0])
