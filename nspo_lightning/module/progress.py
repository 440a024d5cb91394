"""How far a run has come: what a training step changes before any weight moves, and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.evaluation.thoughts import is_unfinished
from nspo_lightning.module.ahead import Ahead
from nspo_lightning.module.finite import NonFiniteError, nonfinite_gradient, nonfinite_message, on_any_rank
from nspo_lightning.module.open_rollouts import OpenRollouts
from nspo_lightning.module.update_window import UpdateWindow
from nspo_lightning.rewards import RewardError

COUNTERS = (
    *("rollouts", "rollouts_scored", "unscored_in_a_row", "num_tokens"),
    *("updates", "updates_undone", "updates_skipped", "updates_nonfinite", "nonfinite_in_a_row"),
)
_CURE = (
    "Return a number wherever there is something to score. If it comes from a judge with `on_error: exclude`, see why "
    "that fails (`judge/<name>/errors` and `excluded`)."
)


def _unscored_cure(completions: Sequence[str], number: int) -> str:
    """Say what would give completions a score, of which this rank has some; all ranks ask together."""
    cut = sum(ranks.gather_objects(sum(map(is_unfinished, completions))))
    if not cut:
        return _CURE
    room = (
        f"{cut} of the {number} completions are thoughts that do not end, so there is no answer to score: raise "
        "`sampling.max_new_tokens`."
    )
    return room if cut == number else f"{room} {_CURE}"


class UnscoredError(RewardError):
    """Rewards gave None for every completion, and nothing was learnt."""

    raised_on_all_ranks = True
    """All have seen the same rewards."""


@dataclass(kw_only=True)
class Progress:
    """Counts, the accumulation window, and the rollout that is being learnt from.

    Attributes:
        max_nonfinite: Updates in a row that are skipped for something not finite, before the run ends.
        max_unscored: Rollouts in a row without one score, before the run ends.
        seed: The run's, for the noise of rollouts.
        rollouts: Batches that were rolled out.
        rollouts_scored: Of those, the ones with a score.
        unscored_in_a_row: Rollouts since the last one with a score.
        num_tokens: Tokens of prompts and completions, over all ranks.
        updates: Updates that were taken and stand: steps of the optimizer. Lightning's `global_step` counts all.
        updates_undone: Updates that were taken, and taken back, see `go_back`.
        updates_skipped: Updates without signal.
        updates_nonfinite: Updates that were skipped because something was not finite.
        nonfinite_in_a_row: Of those, the ones since the last update that was taken.
        window: What the batches since the last update have come to.
        open_rollouts: What is left of the last rollouts.
        ahead: What was asked for the batch that comes next, see `Rollouts.ask`.
        saved_ahead: That of all ranks in a checkpoint, until `load_rollouts` takes this rank's.
        saved_rollouts: Those of all ranks in a checkpoint, until `load_rollouts` takes this rank's.
        unscored_cure: What would have given the last rollout without a score one.
    """

    max_nonfinite: int
    max_unscored: int = 1
    seed: int = 0
    rollouts: int = 0
    rollouts_scored: int = 0
    unscored_in_a_row: int = 0
    num_tokens: int = 0
    updates: int = 0
    updates_undone: int = 0
    updates_skipped: int = 0
    updates_nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    window: UpdateWindow = field(default_factory=UpdateWindow)
    open_rollouts: OpenRollouts = field(default_factory=OpenRollouts)
    ahead: Ahead | None = None
    saved_ahead: list[Any] = field(default_factory=list)
    saved_rollouts: list[Any] = field(default_factory=list)
    unscored_cure: str = _CURE

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

    def count_rewards(
        self, rewards: Tensor, group_size: int, names: Sequence[str], completions: Sequence[str] = ()
    ) -> None:
        """Count a rollout, and see whether there is anything to learn from it; ranks must ask with the same.

        Args:
            rewards: Shape (R,), of all ranks; NaN = excluded.
            group_size: Completions a prompt.
            names: What the rewards are called.
            completions: This rank's.

        Raises:
            UnscoredError: If too many rollouts in a row have no score at all.
        """
        self.rollouts += 1
        scored = rewards.isfinite().view(-1, group_size)
        if bool(scored.any()):
            self.rollouts_scored, self.unscored_in_a_row = self.rollouts_scored + 1, 0
            groups = rewards.view(-1, group_size)
            low, high = (groups.masked_fill(~scored, end) for end in (torch.inf, -torch.inf))
            if self.rollouts == 1 and not bool((high.amax(1) > low.amin(1)).any()):
                rank_zero_warn(
                    "All completions of a prompt got the same reward, for each prompt of rollout 1: no group has a "
                    "signal, and without one (and at `beta` 0) a step is no update (`updates_skipped`). If it stays "
                    "so, let the reward tell completions apart, or raise `sampling.temperature` or `group_size`."
                )
            return
        self.unscored_in_a_row += 1
        self.unscored_cure = _unscored_cure(completions, len(rewards))
        told = ", ".join(f"'{name}'" for name in names)
        if self.unscored_in_a_row >= self.max_unscored:
            raise UnscoredError(
                f"Reward {told} gave None for all completions of {self.unscored_in_a_row} rollouts in a row "
                f"(`max_unscored_rollouts` is {self.max_unscored}), so nothing was learnt from them. "
                f"{self.unscored_cure}"
            )
        if self.unscored_in_a_row == 1:
            rank_zero_warn(
                f"Reward {told} gave None for all {len(rewards)} completions of rollout {self.rollouts}: nothing is "
                f"learnt from it. After {self.max_unscored} such rollouts in a row the run ends "
                f"(`max_unscored_rollouts`). {self.unscored_cure}"
            )

    def check_end(self, steps: int) -> None:
        """See when training is over whether it was any.

        Args:
            steps: Of the Trainer, with those that were skipped.

        Raises:
            UnscoredError: If not one completion was scored.
        """
        if self.unscored_in_a_row and not self.rollouts_scored:
            raise UnscoredError(
                f"Nothing was learnt: not one completion of {self.rollouts} rollouts was scored, the rewards gave None "
                f"for all. {self.unscored_cure}"
            )
        if self.rollouts and not self.updates:
            what, undone = "was taken in", ""
            if self.updates_undone:
                what, undone = "is left after", f", {self.updates_undone} taken back"
            rank_zero_warn(
                f"No update {what} {steps} steps ({self.updates_skipped} without a signal, "
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
        counters |= self.window.to_counters()
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

    def load_rollouts(self, device: torch.device) -> None:
        """Go on with this rank's rollouts of a checkpoint, if it was made with as many ranks."""
        saved, self.saved_rollouts = self.saved_rollouts, []
        if len(saved) == ranks.world_size():
            self.open_rollouts = OpenRollouts.from_state_dict(saved[ranks.rank()], device)
        answered, self.saved_ahead, self.ahead = self.saved_ahead, [], None
        if len(answered) == ranks.world_size():
            self.ahead = Ahead.from_state_dict(answered[ranks.rank()], device)
