"""Run command lines in worker processes, a progress bar over all of them, each run's output in a file of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

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
    over = context.Event()
    executor = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(os.getpid(), over))
    with _ended_by_signals():
        try:
            with rows_progress("Comparing", len(jobs), unit="run", console=console) as advance:
                for future in as_completed([executor.submit(run_one, job, run) for job in jobs]):
                    result = future.result()
                    results.append(result)
                    state = f"failed: {result.error}" if result.error else f"{result.seconds:.0f} s"
                    console.print(f"{result.name}: {state}", highlight=False)
                    advance()
        except BaseException:
            over.set()  # a worker begins nothing more
            executor.shutdown(wait=False, cancel_futures=True)
            _end([process for process in multiprocessing.active_children() if process not in others], console)
            raise
    executor.shutdown()
    return results


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End on SIGTERM, and on SIGHUP where it isn't ignored (nohup), by an exception as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n is not None]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end(processes: Sequence[BaseProcess], console: Console) -> None:
    """Tell workers to stop, and wait: what is finished is on disk, and a run that saves its state goes on from it."""
    for process in processes:
        process.terminate()
    console.print("Stopping: the runs save their state. The same command goes on from it.")
    try:
        for process in processes:
            process.join()
    except BaseException:  # a second signal does not wait
        for process in processes:
            process.kill()
        raise


_over: Event | None = None


def _begin_worker(parent: int, over: Event) -> None:
    global _over
    _over = over
    _die_with(parent)


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
    if _over is not None and _over.is_set():
        return JobResult(name=job.name, seconds=0.0, error="not begun: the comparison was stopped")
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
