"""How far a run has come: what a training step changes before any weight moves, and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from nspo_lightning import ranks
from nspo_lightning.module.finite import NonFiniteError, nonfinite_gradient, nonfinite_message, on_any_rank
from nspo_lightning.module.open_rollouts import OpenRollouts
from nspo_lightning.module.update_window import UpdateWindow

COUNTERS = ("rollouts", "num_tokens", "updates_skipped", "updates_nonfinite", "nonfinite_in_a_row")


@dataclass(kw_only=True)
class Progress:
    """Counts, the accumulation window, and the rollout that is being learnt from.

    Attributes:
        max_nonfinite: Updates in a row that are skipped for something not finite, before the run ends.
        seed: The run's, for the noise of rollouts.
        rollouts: Batches that were rolled out.
        num_tokens: Tokens of prompts and completions, over all ranks.
        updates_skipped: Updates without signal.
        updates_nonfinite: Updates that were skipped because something was not finite.
        nonfinite_in_a_row: Of those, the ones since the last update that was taken.
        window: What the batches since the last update have come to.
        open_rollouts: What is left of the last rollouts.
        saved_rollouts: Those of all ranks in a checkpoint, until `load_rollouts` takes this rank's.
    """

    max_nonfinite: int
    seed: int = 0
    rollouts: int = 0
    num_tokens: int = 0
    updates_skipped: int = 0
    updates_nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    window: UpdateWindow = field(default_factory=UpdateWindow)
    open_rollouts: OpenRollouts = field(default_factory=OpenRollouts)
    saved_rollouts: list[Any] = field(default_factory=list)

    @property
    def noise_seed(self) -> int:
        """The next rollout's."""
        return self.seed * 1_000_003 + self.rollouts

    def close_window(self, parameters: Iterable[nn.Parameter], *, look: bool) -> UpdateWindow:
        """Return the window, with what a look at its gradients shows, and begin a new one."""
        window, self.window = self.window, UpdateWindow()
        if look and window.has_signal and not window.nonfinite:
            window.nonfinite = on_any_rank(nonfinite_gradient(parameters), "gradient")
        return window

    def skip_nonfinite(self, seen: str, update: int) -> None:
        """Count an update that is skipped for what was seen in it, and give up after too many in a row."""
        self.updates_nonfinite += 1
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row >= self.max_nonfinite:
            raise NonFiniteError(nonfinite_message(seen, self.nonfinite_in_a_row, update))
        rank_zero_warn(f"Update {update} is skipped: {seen}.")

    def snapshot(self) -> dict[str, Any]:
        """Copy what a training step changes, cheaply: the rollouts' tensors are shared."""
        counters = {name: value for name, value in vars(self).items() if name in COUNTERS}
        return {"counters": counters | self.window.to_counters(), "rollouts": self.open_rollouts.snapshot()}

    def state_dict(self, snapshot: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a checkpoint holds, of an earlier snapshot or of now; all ranks must ask together."""
        now = snapshot or self.snapshot()
        buffers = ranks.gather_objects(now["rollouts"].state_dict())
        return {"seed": self.seed, "buffers": buffers, "counters": now["counters"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; `load_rollouts` follows when it is known where tensors shall be."""
        self.seed, self.saved_rollouts = int(state["seed"]), state["buffers"]
        for name in COUNTERS:
            setattr(self, name, state["counters"].get(name, 0))
        self.window = UpdateWindow.from_counters(state["counters"])

    def load_rollouts(self, device: torch.device) -> None:
        """Go on with this rank's rollouts of a checkpoint, if it was made with as many ranks."""
        saved, self.saved_rollouts = self.saved_rollouts, []
        if len(saved) == ranks.world_size():
            self.open_rollouts = OpenRollouts.from_state_dict(saved[ranks.rank()], device)
