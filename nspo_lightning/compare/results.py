"""Results of a comparison as rows: one for each run, read from disk, written as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspo_lightning.compare.plan import RunSpec
from nspo_lightning.compare.selection import UNSAFE, SelectionRule, mean_and_spread


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run."""

    spec: RunSpec
    selected: dict[str, float]
    """The selected checkpoint on validation prompts."""
    test: dict[str, float]
    """The same checkpoint on test prompts."""
    prompts: dict[str, int]
    """Test prompts, harmful and general."""
    trajectory: list[dict[str, float]]
    seconds: float
    leak: float | None
    null_share: float | None
    energy_left: float | None

    @classmethod
    def read(cls, spec: RunSpec, path: Path) -> RunResult:
        """Read a run's ``result.json``."""
        data = json.loads(path.read_text())
        return cls(
            spec=spec,
            selected=data["selected"],
            test=data["test"],
            prompts=data["test_prompts"],
            trajectory=data["trajectory"],
            seconds=data["seconds"],
            leak=data["leak"],
            null_share=data["null_share"],
            energy_left=data["energy_left"],
        )

    def row(self) -> dict[str, Any]:
        """Return the run as a flat row."""
        return {
            "run": self.spec.name,
            "method": self.spec.method,
            "variant": self.spec.variant,
            "learning_rate": self.spec.learning_rate,
            "seed": self.spec.seed,
            "selected_rollout": self.selected.get("rollouts"),
            **{f"validation/{k}": v for k, v in self.selected.items() if "/" in k},
            **{f"test/{k}": v for k, v in self.test.items()},
            "test_prompts/harmful": self.prompts["harmful"],
            "test_prompts/general": self.prompts["general"],
            "leak": self.leak,
            "null_share": self.null_share,
            "energy_left": self.energy_left,
            "rollouts": self.trajectory[-1].get("rollouts") if self.trajectory else None,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one method (or variant) at its selected learning rate, one a seed."""

    label: str
    learning_rate: float | None
    results: Sequence[RunResult]

    def test(self, metric: str) -> tuple[float, float]:
        """Return mean and spread over seeds of a test metric."""
        return mean_and_spread([r.test[metric] for r in self.results if metric in r.test])


def write_csv(results: Iterable[RunResult], path: Path) -> Path:
    """Write one row a run."""
    rows = [r.row() for r in results]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def group_results(results: Iterable[RunResult], rule: SelectionRule) -> dict[str, Group]:
    """Choose each method's learning rate by the same rule as its checkpoints: on validation, by the mean over seeds.

    Args:
        results: All runs.
        rule: The selection rule.

    Returns:
        Label to group, in the order in which labels first appear.
    """
    by_label: dict[str, dict[float | None, list[RunResult]]] = {}
    for result in results:
        by_label.setdefault(result.spec.label, {}).setdefault(result.spec.learning_rate, []).append(result)
    groups: dict[str, Group] = {}
    for label, rates in by_label.items():
        most = max(len(runs) for runs in rates.values())
        complete = {rate: runs for rate, runs in rates.items() if len(runs) == most}

        def key(rate: float | None, complete: Mapping[float | None, list[RunResult]] = complete) -> Any:
            names = (UNSAFE, rule.metric)
            return rule.preference({n: mean_and_spread([r.selected[n] for r in complete[rate]])[0] for n in names})

        best = max(complete, key=key)
        groups[label] = Group(label=label, learning_rate=best, results=complete[best])
    return groups
