"""Whether an update is taken, and how a window of accumulated batches is weighted. Plain values, no model, no ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nspo_lightning.grpo import LossType, Normaliser


@dataclass(kw_only=True)
class UpdateWindow:
    """What the batches since the last update have come to; ranks agree on each value.

    Attributes:
        has_signal: Whether one of them had something to learn from. Without, no step is taken: zero gradients would
            still let Adam's momentum move the weights.
        tokens: Trained tokens of each batch, the mean over ranks.
        nonfinite: What in one of them was not finite, "" if nothing was. If something was, no step is taken.
    """

    has_signal: bool = False
    tokens: list[float] = field(default_factory=list)
    nonfinite: str = ""

    def add(self, counts: Normaliser, loss_type: LossType) -> Normaliser:
        """Note a batch's counts, and return those that its loss is divided by."""
        # `dapo` divides by the tokens of the whole window, which are known only at its end. So each batch is divided by
        # the first one's, and `correction` makes up for it.
        self.tokens.append(counts.num_tokens)
        return counts if loss_type != "dapo" else replace(counts, num_tokens=max(self.tokens[0], 1.0))

    def correction(self, loss_type: LossType, accumulated: int) -> float:
        """Say what makes a ``dapo`` window's gradient the mean over all its tokens.

        Args:
            loss_type: Other losses need no correction.
            accumulated: The number of batches, which Lightning divides by.

        Returns:
            The factor, 1 for no correction.

        Example:
            >>> UpdateWindow(tokens=[10.0, 30.0]).correction("dapo", 2)  # (g1 / 10 + g2 / 10) / 2 -> (g1 + g2) / 40
            0.5
        """
        if loss_type != "dapo" or len(self.tokens) < 2:
            return 1.0
        return accumulated * self.tokens[0] / max(sum(self.tokens), 1.0)

    def to_counters(self) -> dict[str, Any]:
        """Return plain values under the names that checkpoints have for them."""
        return {f"_window_{name}": value for name, value in vars(replace(self, tokens=list(self.tokens))).items()}

    @classmethod
    def from_counters(cls, counters: Mapping[str, Any]) -> UpdateWindow:
        """Make the window again from what `to_counters` returned, among others."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: counters[f"_window_{name}"] for name in names if f"_window_{name}" in counters})
