"""Finished runs of a comparison, made from the checkpoints that they are to have had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nspo_lightning.compare.plan import RunSpec
from nspo_lightning.compare.results import RunResult


def finished_run(spec: RunSpec, trajectory: Sequence[Mapping[str, float]]) -> RunResult:
    """Return the run whose last checkpoint was selected, and measures the same in the test."""
    records = [dict(record) for record in trajectory]
    return RunResult(
        spec=spec,
        selected=records[-1],
        test=records[-1],
        prompts={"harmful": 1, "general": 1},
        trajectory=records,
        seconds=1.0,
        leak=None,
        null_share=None,
        energy_left=None,
    )
