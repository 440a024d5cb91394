"""What a method costs beside what it reaches: seconds a step, seconds before the first one, bytes held."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nspo_lightning.callbacks.protocols import HoldsMemory


class Cost:
    """Adds up what training steps take; validation, loading and measuring are left out."""

    def __init__(self) -> None:
        self._sums = {"steps": 0.0, "seconds": 0.0, "cpu_seconds": 0.0, "setup_seconds": 0.0}
        self._fit_began: float | None = None
        self._step_began = (0.0, 0.0)

    def begin(self, device: torch.device) -> None:
        """Note that the fit begins: until the first step it calibrates, or reads text."""
        self._fit_began = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step_begins(self) -> None:
        """Note that a training step begins, and what came before the first one."""
        now = time.monotonic()
        if self._fit_began is not None:
            self._sums["setup_seconds"] += now - self._fit_began
            self._fit_began = None
        self._step_began = (now, time.process_time())

    def step_ends(self) -> None:
        """Note that it is over."""
        wall, cpu = self._step_began
        self._sums["steps"] += 1
        self._sums["seconds"] += time.monotonic() - wall
        self._sums["cpu_seconds"] += time.process_time() - cpu

    def state_dict(self) -> dict[str, float]:
        """Return the sums so far."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from an earlier process's sums."""
        self._sums |= state

    def found(self, callbacks: Iterable[Any], device: torch.device) -> dict[str, float]:
        """Return what was found.

        Args:
            callbacks: Of the run; those that hold memory are asked how much.
            device: Where the model is.

        Returns:
            `step_seconds` and `step_cpu_seconds` (of all threads of this process), the means; `setup_seconds`;
            `held_bytes`; on a GPU `peak_bytes`.
        """
        steps = max(self._sums["steps"], 1.0)
        held = sum(callback.held_bytes() for callback in callbacks if isinstance(callback, HoldsMemory))
        found = {
            "step_seconds": self._sums["seconds"] / steps,
            "step_cpu_seconds": self._sums["cpu_seconds"] / steps,
            "setup_seconds": self._sums["setup_seconds"],
            "held_bytes": float(held),
        }
        return found | ({"peak_bytes": float(torch.cuda.max_memory_allocated(device))} if device.type == "cuda" else {})
