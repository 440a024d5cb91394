"""When a run fails, end its other processes on this machine too."""

from __future__ import annotations

import signal
import subprocess
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from nspo_lightning.compat.lightning import started_processes

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
GRACE_S = 10.0
"""Time for the others to end by themselves, as they do if the error is theirs too."""


def set_exit_code_(exception: BaseException) -> None:
    """Give Lightning's exception for SIGTERM an exit code: its own is 0, as if all were done."""
    if isinstance(exception, SIGTERMException):
        exception.code = exception.code or SIGTERM_EXIT_CODE


class EndTogether(Callback):
    """On an exception in the process that Lightning started the others from, wait for them shortly, then end them.

    Without it they would wait for this one in a collective operation: over NCCL for half an hour. And Lightning's
    watch over them, which kills this process within seconds of a failure of theirs, would cut off what it still has to
    say and to save. Where torchrun or SLURM started the processes, that is theirs to do; this callback ends none.

    A run that SIGTERM ends has exit code 143.

    Args:
        grace_s: How long to wait.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        set_exit_code_(exception)
        started = started_processes(trainer)
        processes = list(started)
        for number, process in enumerate(processes, start=1):
            if process.poll():
                rank_zero_info(f"Process {number} of this run ended first, with exit code {process.returncode}.")
        started.clear()  # Lightning watches this very list
        deadline = time.monotonic() + self.grace_s
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
