"""Run command lines in worker processes, a progress bar over all of them, each run's output in a file of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nspo_lightning.terminal import rows_progress

Run = Callable[[list[str]], None]
"""Runs a command line. Workers are processes of their own, so it is a function of a module."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command line."""

    name: str
    arguments: Sequence[str]
    log: Path
    """Gets what the run prints."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What became of a job."""

    name: str
    seconds: float
    error: str = ""
    """Last line of what went wrong; empty = fine."""


def run_all(jobs: Sequence[Job], workers: int, console: Console, run: Run) -> list[JobResult]:
    """Run jobs in this order, several at a time, each by `run`; return results in the order in which they end."""
    if not jobs:
        return []
    cores = (os.cpu_count() or 1) // max(workers, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores, 1)))  # workers inherit it
    results: list[JobResult] = []
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_die_with, initargs=(os.getpid(),))
    try:
        with rows_progress("Comparing", len(jobs), unit="runs", console=console) as advance:
            for future in as_completed([executor.submit(run_one, job, run) for job in jobs]):
                result = future.result()
                results.append(result)
                state = f"failed: {result.error}" if result.error else f"{result.seconds:.0f} s"
                console.print(f"{result.name}: {state}", highlight=False)
                advance()
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # what is finished is on disk; the rest is run again
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
    return results


def _die_with(parent: int) -> None:
    """End this worker when the process that gave it work is gone, whatever ended that: nobody would read the result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_one(job: Job, run: Run) -> JobResult:
    """Run one command line in this process; errors are caught and named in the result."""
    begin = time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    error = ""
    with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            run(list(job.arguments))
        except SystemExit as stop:
            error = f"exit code {stop.code}, see {job.log}" if stop.code else ""
        except Exception as problem:  # one failed run must not end the others
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return JobResult(name=job.name, seconds=time.monotonic() - begin, error=error)
