"""Whether a run's completions get scores: the counts, and what is said where they get none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.evaluation.thoughts import is_unfinished
from nspo_lightning.rewards import RewardError
from nspo_lightning.terminal import counted

COUNTERS = ("rollouts_scored", "unscored_in_a_row")
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

    fails_again = True
    raised_on_all_ranks = True
    """All have seen the same rewards."""


@dataclass(kw_only=True)
class ScoredRollouts:
    """Counts of rollouts with a score.

    Attributes:
        max_unscored: Rollouts in a row without one score, before the run ends.
        rollouts_scored: Rollouts with a score.
        unscored_in_a_row: Rollouts since the last one with a score.
    """

    max_unscored: int = 1
    rollouts_scored: int = 0
    unscored_in_a_row: int = 0
    _cure: str = field(default=_CURE, init=False)

    def count(self, rewards: Tensor, names: Sequence[str], rollout: int, completions: Sequence[str] = ()) -> None:
        """Count a rollout, and see whether it has a score at all; ranks must ask with the same.

        Args:
            rewards: Shape (R,), of all ranks; NaN = excluded.
            names: What the rewards are called.
            rollout: Its number, from 1.
            completions: This rank's.

        Raises:
            UnscoredError: If too many rollouts in a row have no score at all.
        """
        if bool(rewards.isfinite().any()):
            self.rollouts_scored, self.unscored_in_a_row = self.rollouts_scored + 1, 0
            return
        self.unscored_in_a_row += 1
        self._cure = _unscored_cure(completions, len(rewards))
        told = ", ".join(f"'{name}'" for name in names)
        if self.unscored_in_a_row >= self.max_unscored:
            raise UnscoredError(
                f"Reward {told} gave None for all completions of "
                f"{counted(self.unscored_in_a_row, 'rollout', 'rollouts in a row')} "
                f"(`max_unscored_rollouts` is {self.max_unscored}), so nothing was learnt from them. "
                f"{self._cure}"
            )
        if self.unscored_in_a_row == 1:
            rank_zero_warn(
                f"Reward {told} gave None for all {len(rewards)} completions of rollout {rollout}: nothing is "
                f"learnt from it. After {counted(self.max_unscored, 'such rollout')} in a row the run ends "
                f"(`max_unscored_rollouts`). {self._cure}"
            )

    def check_end(self, rollouts: int) -> None:
        """See when training is over whether it was any.

        Args:
            rollouts: All of them.

        Raises:
            UnscoredError: If not one completion was scored.
        """
        if self.unscored_in_a_row and not self.rollouts_scored:
            raise UnscoredError(
                f"Nothing was learnt: not one completion of {counted(rollouts, 'rollout')} was scored, the rewards "
                f"gave None for all. {self._cure}"
            )

    def to_counters(self) -> dict[str, Any]:
        """Return plain values under the names that checkpoints have for them."""
        return {name: value for name, value in vars(self).items() if name in COUNTERS}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Go on from what `to_counters` returned, among others; earlier checkpoints hold none."""
        for name in COUNTERS:
            setattr(self, name, counters.get(name, 0))
