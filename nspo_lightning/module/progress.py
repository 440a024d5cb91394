"""How far a run has come: what a training step changes before any weight moves, and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from nspo_lightning import ranks
from nspo_lightning.module.experience import ExperienceBuffer
from nspo_lightning.module.finite import NonFiniteError, nonfinite_message
from nspo_lightning.module.update_window import UpdateWindow


@dataclass(kw_only=True)
class Counts:
    """What a run has done so far.

    Attributes:
        rollouts: Batches that were rolled out.
        num_tokens: Tokens of prompts and completions, over all ranks.
        updates_skipped: Updates without signal.
        updates_nonfinite: Updates that were skipped because something was not finite.
        nonfinite_in_a_row: Of those, the ones since the last update that was taken.
    """

    rollouts: int = 0
    num_tokens: int = 0
    updates_skipped: int = 0
    updates_nonfinite: int = 0
    nonfinite_in_a_row: int = 0

    def add_nonfinite(self, seen: str, limit: int, update: int) -> None:
        """Count an update that is skipped for something that is not finite.

        Args:
            seen: What it is.
            limit: Skipped updates in a row that end the run.
            update: Updates of the run so far.

        Raises:
            NonFiniteError: At the limit.
        """
        self.updates_nonfinite += 1
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row >= limit:
            raise NonFiniteError(nonfinite_message(seen, self.nonfinite_in_a_row, update))


@dataclass(kw_only=True)
class Progress:
    """Counts, the accumulation window, and the rollout that is being learnt from.

    Attributes:
        seed: The run's, for the noise of rollouts.
        counts: What was done so far.
        window: What the batches since the last update have come to.
        buffer: What is left of the last rollout.
    """

    seed: int = 0
    counts: Counts = field(default_factory=Counts)
    window: UpdateWindow = field(default_factory=UpdateWindow)
    buffer: ExperienceBuffer | None = None

    @property
    def noise_seed(self) -> int:
        """The next rollout's."""
        return self.seed * 1_000_003 + self.counts.rollouts

    def close_window(self) -> UpdateWindow:
        """Return the window and begin a new one."""
        closed, self.window = self.window, UpdateWindow()
        return closed

    def snapshot(self) -> dict[str, Any]:
        """Copy what a training step changes, cheaply: the buffer's tensors are shared."""
        return {"counters": vars(self.counts) | self.window.to_counters(), "buffer": copy(self.buffer)}

    def state_dict(self, snapshot: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a checkpoint holds; all ranks must ask together.

        Args:
            snapshot: What it shall hold instead of the present state.

        Returns:
            Plain values and CPU tensors; the buffers are those of all ranks.
        """
        now = snapshot or self.snapshot()
        buffer = now["buffer"]
        mine = None if buffer is None or buffer.is_empty else buffer.state_dict()
        return {"seed": self.seed, "buffers": ranks.gather_objects(mine), "counters": now["counters"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; its buffers are left to `load_buffer`, when it is known where they shall be."""
        self.seed, counters = int(state["seed"]), state["counters"]
        known = {one.name for one in fields(Counts)}
        self.counts = Counts(**{name: value for name, value in counters.items() if name in known})
        self.window = UpdateWindow.from_counters(counters)

    def load_buffer(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with this rank's rollout of a checkpoint, if it was made with as many ranks."""
        buffers = state["buffers"]
        mine = buffers[ranks.rank()] if len(buffers) == ranks.world_size() else None
        if mine is not None:
            self.buffer = ExperienceBuffer.from_state_dict(mine, device)
