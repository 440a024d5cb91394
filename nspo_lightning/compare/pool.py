"""Run command lines in worker processes, a progress bar over all of them, each run's output in a file of its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_COMMAND_LINE = "nspo_lightning.cli.app"  # run in workers as a user would run it; nothing is imported from it


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command line."""

    name: str
    arguments: Sequence[str]
    log: Path
    """Gets what the run prints."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job."""

    name: str
    seconds: float
    error: str = ""
    """Last line of what went wrong; empty = fine."""


def threads_per_worker(workers: int) -> int:
    """Share the machine's cores between workers."""
    return max((os.cpu_count() or 1) // max(workers, 1), 1)


def run_all(jobs: Sequence[Job], workers: int, console: Console) -> list[Outcome]:
    """Run jobs, several at a time.

    Args:
        jobs: What to run, in this order.
        workers: Processes.
        console: Where the progress goes.

    Returns:
        An outcome for each job, in the order in which they ended.
    """
    if not jobs:
        return []
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_worker(workers)))  # workers inherit it
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        max_workers=workers, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)
    )
    try:
        with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
            task = progress.add_task("runs", total=len(jobs))
            futures = [executor.submit(run_one, job) for job in jobs]
            for future in as_completed(futures):
                outcome = future.result()
                outcomes.append(outcome)
                state = f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.0f} s"
                progress.console.print(f"{outcome.name}: {state}", highlight=False)
                progress.advance(task)
    except BaseException:
        for process in list((getattr(executor, "_processes", None) or {}).values()):
            process.terminate()  # what is finished is on disk; the rest is run again
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
    return outcomes


def _die_with(parent: int) -> None:
    """End this worker when the process that gave it work is gone, whatever ended that: nobody would read the result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_one(job: Job) -> Outcome:
    """Run one command line in this process.

    Args:
        job: What to run.

    Returns:
        What became of it; errors are caught and named.
    """
    begin = time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    error = ""
    with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            importlib.import_module(_COMMAND_LINE).main(list(job.arguments))
        except SystemExit as stop:
            error = f"exit code {stop.code}, see {job.log}" if stop.code else ""
        except Exception as problem:  # one failed run must not end the others
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return Outcome(name=job.name, seconds=time.monotonic() - begin, error=error)
