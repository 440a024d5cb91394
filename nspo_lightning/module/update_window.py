"""Whether an update is taken, and how a window of accumulated batches is weighted. Plain values, no model, no ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nspo_lightning.grpo import LossType, Normaliser


@dataclass(kw_only=True)
class UpdateWindow:
    """What the batches since the last update have come to; ranks agree on each value.

    The gradient of an update is that of one batch with all prompts of its window. So the loss of each batch is its sum
    over tokens, divided by one `unit` that is the same for the whole window, and `correction` turns that into what the
    window has altogether, which is known only at its end. (For ``bnpo`` it is the mean of the batches' token means.)

    Attributes:
        has_signal: Whether one of them had something to learn from. Without, no step is taken: zero gradients would
            still let Adam's momentum move the weights.
        weights: What each batch counts for in the window, see `step_counts`; 0 = it holds nothing.
        nonfinite: What in one of them was not finite, "" if nothing was. If something was, no step is taken.
    """

    has_signal: bool = False
    weights: list[float] = field(default_factory=list)
    nonfinite: str = ""

    @property
    def unit(self) -> float:
        """What losses are divided by: the first weight that is not zero (`token_weights` goes no lower than 1)."""
        return max(next((weight for weight in self.weights if weight > 0), 1.0), 1.0)

    def add(self, counts: Normaliser, weight: float, loss_type: LossType) -> Normaliser:
        """Note a batch, and return the counts that its loss is divided by."""
        self.weights.append(weight)
        if loss_type == "bnpo":  # no weight is above 1, so the unit is 1
            return counts
        return replace(counts, num_tokens=self.unit) if loss_type == "dapo" else replace(counts, num_rows=self.unit)

    @property
    def own_scale(self) -> float:
        """What makes the last batch's loss the mean over what it holds itself, to show it."""
        return self.unit / self.weights[-1] if self.weights and self.weights[-1] > 0 else 1.0

    def correction(self, accumulated: int) -> float:
        """Say what makes the sum of the batches' gradients the mean over all that the window held.

        Args:
            accumulated: The number that Lightning divides each loss by, whatever the number of batches: the last
                window of an epoch may have fewer.

        Returns:
            The factor; 1 for batches of equal weight in a full window.

        Example:
            >>> UpdateWindow(weights=[10.0, 30.0]).correction(2)  # (g1 / 10 + g2 / 10) / 2 -> (g1 + g2) / 40
            0.5
        """
        total = sum(self.weights)
        return accumulated * self.unit / total if total > 0 else 1.0

    def to_counters(self) -> dict[str, Any]:
        """Return plain values under the names that checkpoints have for them."""
        return {f"_window_{name}": value for name, value in vars(replace(self, weights=list(self.weights))).items()}

    @classmethod
    def from_counters(cls, counters: Mapping[str, Any]) -> UpdateWindow:
        """Make the window again from what `to_counters` returned, among others."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: counters[f"_window_{name}"] for name in names if f"_window_{name}" in counters})
