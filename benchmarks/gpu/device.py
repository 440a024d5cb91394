"""The device: what it is, its clock, its memory, and what it said while something ran."""

from __future__ import annotations

import gc
import logging
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Device:
    """A CUDA device, or the CPU in its place."""

    def __init__(self, kind: str) -> None:
        self.torch = torch.device("cuda", 0) if kind == "cuda" else torch.device(kind)
        self.is_cuda = kind == "cuda"

    def about(self) -> dict[str, Any]:
        """Describe it."""
        if not self.is_cuda:
            return {"name": "CPU"}
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "memory_gb": found.total_memory / 1e9,
            "compute_capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
            "bytes_a_second": self.bytes_a_second(),
            "copied_bytes_a_second": self.copied_bytes_a_second(),
        }

    def bytes_a_second(self) -> float | None:
        """Return the memory's speed: by its clock (twice) and width where torch tells them, else that of a copy."""
        if not self.is_cuda:
            return None
        found = torch.cuda.get_device_properties(0)
        try:
            return float(2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8)
        except AttributeError:
            return self.copied_bytes_a_second()

    def copied_bytes_a_second(self, size: int = 2**30) -> float:
        """Return the bytes a second, read and written, of a copy within the device."""
        source = torch.zeros(size, dtype=torch.uint8, device=self.torch)
        target = source.clone()
        begin = self.now()
        for _ in range(4):
            target.copy_(source)
        return 4 * 2 * size / (self.now() - begin)

    def now(self) -> float:
        """Return the time in seconds, with all that was asked of the device done."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def clear(self) -> None:
        """Free what nobody holds, and count the peak anew."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def reset_peak(self) -> None:
        """Count the peak anew."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Return the most that tensors have taken since the last reset (on a CPU: the process, since its start)."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def reserved_gb(self) -> float:
        """Return the most that the allocator has taken since the last reset: what a smaller card must hold."""
        return torch.cuda.max_memory_reserved() / 1e9 if self.is_cuda else self.peak_gb()

    @contextmanager
    def limited(self, gb: float | None) -> Iterator[None]:
        """Let tensors take no more than so much inside the block, as if the card were smaller; None = no limit."""
        if gb is None or not self.is_cuda:
            yield
            return
        torch.cuda.set_per_process_memory_fraction(
            min(gb * 1e9 / torch.cuda.get_device_properties(0).total_memory, 1.0)
        )
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


class Spent:
    """Seconds and calls of functions, by name."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def wrap(self, name: str, original: Callable[..., Any], after: Callable[[], None] | None = None) -> Any:
        """Return a function that does the same and counts; `after` runs at its end."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._device.now()
            result = original(*args, **kwargs)
            self.seconds[name] += self._device.now() - begin
            if after is not None:
                after()
            return result

        return timed

    @contextmanager
    def methods(self, owner: type, names: list[str], after: Callable[[], None] | None = None) -> Iterator[None]:
        """Count a class's methods inside the block."""
        originals = {name: getattr(owner, name) for name in names}
        for name, original in originals.items():
            setattr(owner, name, self.wrap(name, original, after))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(owner, name, original)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Yield what is logged or warned inside the block, once each: what `auto` chose, what was fallen back from."""
    heard: list[str] = []

    def hear(text: str) -> None:
        if text not in heard:
            heard.append(text[:500])

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record.getMessage())

    ear = Ear(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("nspo_lightning", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    shown = warnings.showwarning
    for logger in loggers:
        logger.addHandler(ear)
        logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *args, **kwargs: hear(str(message))
        try:
            yield heard
        finally:
            warnings.showwarning = shown
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(ear)
                logger.setLevel(level)
