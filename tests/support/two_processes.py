"""Run a function in two processes that are ranks of one gloo group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn as start_processes


def spawn(job: Callable[[int, Path], Any], folder: Path, *, forked: bool = False) -> list[Any]:
    """Run ``job(rank, folder)`` on two ranks.

    Args:
        job: A function of a module.
        folder: For the ranks' meeting, and what they return.
        forked: Fork this process, which has imported everything; for jobs that compute nothing to speak of.

    Returns:
        What each returned.
    """
    how = "fork" if forked else "spawn"
    start_processes(_entry, args=(job, folder), nprocs=2, join=True, start_method=how)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _entry(rank: int, job: Callable[[int, Path], Any], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(job(rank, folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
