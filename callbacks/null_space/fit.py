"""What the callback knows of one fit, from its start to the start of the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from nspo_lightning.callbacks.null_space.facts import KeptEnergy
from nspo_lightning.callbacks.null_space.hold import Hold
from nspo_lightning.callbacks.null_space.inference import OutputCheck
from nspo_lightning.callbacks.null_space.verification import Verification
from nspo_lightning.callbacks.null_space.watch import Buffers, StillStatistics
from nspo_lightning.nullspace.keeper import GradientEnergy


@dataclass(kw_only=True)
class Fit:
    """What is held, what is watched, and what was seen.

    Attributes:
        hold: The matrices, and where they began.
        statistics: Normalisations that are to stay as they are.
        buffers: Buffers before training.
        outputs: Outputs before training; None again once it is measured how far they moved.
        verification: What the check before training found; None = not made.
        output_change: How far outputs moved, see `OutputCheck`.
        energy: Of the gradients since the last logged step, one for each optimizer.
        kept: Of the gradients' energy what projections kept, for the diagnosis.
        told: Titles of findings that were warned of.
    """

    hold: Hold = field(default_factory=Hold)
    statistics: StillStatistics | None = None
    buffers: Buffers | None = None
    outputs: OutputCheck | None = None
    verification: Verification | None = None
    output_change: float | None = None
    energy: list[GradientEnergy] = field(default_factory=list)
    kept: KeptEnergy = field(default_factory=KeptEnergy)
    told: set[str] = field(default_factory=set)
