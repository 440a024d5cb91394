"""How far a run has come: what a training step changes before any weight moves, and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from nspo_lightning import ranks
from nspo_lightning.module.ahead import Ahead
from nspo_lightning.module.finite import NonFiniteError, nonfinite_gradient, nonfinite_message, on_any_rank
from nspo_lightning.module.open_rollouts import OpenRollouts
from nspo_lightning.module.scored_rollouts import ScoredRollouts
from nspo_lightning.module.signal import Signal
from nspo_lightning.module.update_window import UpdateWindow
from nspo_lightning.terminal import counted

COUNTERS = (
    *("rollouts", "num_tokens"),
    *("updates", "updates_undone", "updates_skipped", "updates_nonfinite", "nonfinite_in_a_row"),
)


@dataclass(kw_only=True)
class Progress:
    """Counts, the accumulation window, and the rollout that is being learnt from.

    Attributes:
        max_nonfinite: Updates in a row that are skipped for something not finite, before the run ends.
        seed: The run's, for the noise of rollouts.
        rollouts: Batches that were rolled out.
        num_tokens: Tokens of prompts and completions, over all ranks.
        updates: Updates that were taken and stand: steps of the optimizer. Lightning's `global_step` counts all.
        updates_undone: Updates that were taken, and taken back, see `go_back`.
        updates_skipped: Updates without signal.
        updates_nonfinite: Updates that were skipped because something was not finite.
        nonfinite_in_a_row: Of those, the ones since the last update that was taken.
        scored: Which rollouts had a score.
        signal: Which had something to learn from.
        window: What the batches since the last update have come to.
        open_rollouts: What is left of the last rollouts.
        ahead: What was asked for the batch that comes next, see `Rollouts.ask`.
        saved_ahead: That of all ranks in a checkpoint, until `load_rollouts` takes this rank's.
        saved_rollouts: Those of all ranks in a checkpoint, until `load_rollouts` takes this rank's.
    """

    max_nonfinite: int
    seed: int = 0
    rollouts: int = 0
    num_tokens: int = 0
    updates: int = 0
    updates_undone: int = 0
    updates_skipped: int = 0
    updates_nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    scored: ScoredRollouts = field(default_factory=ScoredRollouts)
    signal: Signal = field(default_factory=Signal)
    window: UpdateWindow = field(default_factory=UpdateWindow)
    open_rollouts: OpenRollouts = field(default_factory=OpenRollouts)
    ahead: Ahead | None = None
    saved_ahead: list[Any] = field(default_factory=list)
    saved_rollouts: list[Any] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Updates that were not taken."""
        return self.updates_skipped + self.updates_nonfinite

    @property
    def steps(self) -> int:
        """Updates that were taken, taken back or skipped, as Lightning counts them."""
        return self.updates + self.updates_undone + self.skipped

    @property
    def noise_seed(self) -> int:
        """The next rollout's."""
        return self.seed * 1_000_003 + self.rollouts

    def warn_without_update(self, steps: int) -> None:
        """Say when training is over that no update stands; `steps` are the Trainer's, with those that were skipped."""
        if self.rollouts and not self.updates:
            what, undone = "was taken in", ""
            if self.updates_undone:
                what, undone = "is left after", f", {self.updates_undone} taken back"
            rank_zero_warn(
                f"No update {what} {counted(steps, 'step')} ({self.updates_skipped} without a signal, "
                f"{self.updates_nonfinite} not finite{undone}): the policy is what it was before."
            )

    def go_back(self, updates: int) -> None:
        """Go on from weights as they were after so many updates, their gradients gone.

        The rest of a rollout that later weights have drawn is dropped; what they were asked for is left to
        `Ahead.is_of`, which knows when the server is done with it.
        """
        undone = max(self.updates - updates, 0)
        self.updates, self.updates_undone = self.updates - undone, self.updates_undone + undone
        self.window, self.open_rollouts = UpdateWindow(), OpenRollouts()

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
        counters |= self.window.to_counters() | self.scored.to_counters() | self.signal.to_counters()
        return {"counters": counters, "rollouts": self.open_rollouts.snapshot(), "ahead": self.ahead}

    def state_dict(self, snapshot: Mapping[str, Any] | None, *, wait: bool = True) -> dict[str, Any]:
        """Return what a checkpoint holds, of an earlier snapshot or of now; all ranks must ask together.

        If not to `wait`, a rollout that was asked for and is not there yet is left out, and asked for anew after a
        resume.
        """
        now = snapshot or self.snapshot()
        ahead: Ahead | None = now["ahead"]
        mine = now["rollouts"].state_dict(), None if ahead is None else ahead.state_dict(wait=wait)
        buffers, answered = zip(*ranks.gather_objects(mine), strict=True)
        if any(one is None for one in answered):  # all ranks ask together
            answered = ()
        return {"seed": self.seed, "buffers": list(buffers), "ahead": list(answered), "counters": now["counters"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; `load_rollouts` follows when it is known where tensors shall be."""
        self.seed, self.saved_rollouts = int(state["seed"]), state["buffers"]
        self.saved_ahead = state.get("ahead", [])
        for name in COUNTERS:
            setattr(self, name, state["counters"].get(name, 0))
        self.window = UpdateWindow.from_counters(state["counters"])
        self.scored.load_counters(state["counters"])
        self.signal.load_counters(state["counters"])

    def load_rollouts(self, device: torch.device) -> None:
        """Go on with this rank's rollouts of a checkpoint, if it was made with as many ranks."""
        saved, self.saved_rollouts = self.saved_rollouts, []
        if len(saved) == ranks.world_size():
            self.open_rollouts = OpenRollouts.from_state_dict(saved[ranks.rank()], device)
        answered, self.saved_ahead, self.ahead = self.saved_ahead, [], None
        if len(answered) == ranks.world_size():
            self.ahead = Ahead.from_state_dict(answered[ranks.rank()], device)
