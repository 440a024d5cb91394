"""Run rewards with a deadline: sync ones on a worker thread, async ones on an event loop of their own.

A reward that hangs must end as an error, and Python can't interrupt a thread. So the caller waits with a timeout on a
daemon thread, gives the hung thread up and starts a fresh one for the next call; daemon threads don't keep the process
alive. The loop lives on a thread of its own too, hence async rewards also run where a loop is running already
(Jupyter, an async trainer).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_LOOP_GRACE_S = 5.0
"""How much longer than its own timeout a blocked event loop is waited for."""


class DeadlineError(Exception):
    """The runner's own timeout ran out (unlike a TimeoutError, which a reward may raise itself)."""


class RewardRunner:
    """A worker thread and an event loop, both started when first needed; `name` is the prefix of the threads' names."""

    def __init__(self, name: str = "reward") -> None:
        self.name = name
        self._pid = os.getpid()
        self._tasks: queue.SimpleQueue[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}  # threads can't be pickled; a copy starts its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"])  # type: ignore[misc]

    def call(self, function: Callable[[], T], timeout_s: float | None) -> T:
        """Return what a function returns on the worker thread, where it sees the caller's CUDA device and no autograd.

        Without a `timeout_s` it runs on the caller's own thread, without a limit.

        Raises:
            DeadlineError: If it took longer. The thread is given up, the function may still be running in it.
        """
        if timeout_s is None:
            with torch.no_grad():
                return function()
        self._check_fork()
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._tasks,), name=f"{self.name}-worker", daemon=True).start()
        future: Future[T] = Future()
        device = _current_cuda_device()
        self._tasks.put((function, device, future))
        if not _finished(future, timeout_s):
            self._tasks.put(None)  # ends the thread if it ever comes back
            self._tasks = None
            raise DeadlineError
        return future.result()

    def submit(self, awaitable: Awaitable[T], timeout_s: float | None) -> Future[T]:
        """Start an awaitable on the loop; after `timeout_s`, if given, it is cancelled. The future is for `collect`."""

        async def bounded() -> T:
            task = asyncio.ensure_future(awaitable)
            try:
                done, _ = await asyncio.wait({task}, timeout=timeout_s)
            finally:
                if not task.done():
                    task.cancel()
            if not done:
                raise DeadlineError
            return task.result()

        return asyncio.run_coroutine_threadsafe(bounded(), self._running_loop())

    def collect(self, future: Future[T], timeout_s: float | None) -> T:
        """Return the result of a submitted awaitable, within the limit that `submit` was given.

        Raises:
            DeadlineError: If it took longer, or blocked its event loop so that nothing could run.
        """
        if not _finished(future, None if timeout_s is None else timeout_s + _LOOP_GRACE_S):
            future.cancel()
            self._loop = None  # something blocks it; the next call gets a new one
            raise DeadlineError
        return future.result()

    def close(self) -> None:
        """End both threads. A later call starts them again."""
        if self._pid == os.getpid():
            if self._tasks is not None:
                self._tasks.put(None)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._forget()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        self._check_fork()
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name=f"{self.name}-loop", daemon=True).start()
        return self._loop

    def _check_fork(self) -> None:
        if self._pid != os.getpid():  # threads don't survive a fork
            self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._tasks = None
        self._loop = None


def _current_cuda_device() -> int | None:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if initialized else None


def _finished(future: Future[Any], timeout_s: float | None) -> bool:
    """Wait for a future without taking its exception for a timeout of ours; True if it is done."""
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    return done.wait(timeout_s)


def _work(tasks: queue.SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        function, device, future = task
        try:
            if device is not None:
                torch.cuda.set_device(device)  # the current device belongs to a thread
            with torch.no_grad():
                future.set_result(function())
        except BaseException as error:  # the waiting thread must learn of SystemExit too
            future.set_exception(error)
        del function, future, task  # hold no batch while idle


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
