"""Results of a comparison: one for each run, read from disk, written as CSV, and grouped by method."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from nspo_lightning.compare.plan import Budget, RunSpec
from nspo_lightning.compare.selection import SelectionRule, front_at, mean_and_spread
from nspo_lightning.compare.sweeps import Sweep
from nspo_lightning.evaluation.rates import REFUSAL, UNSAFE
from nspo_lightning.evaluation.text_means import in_nats

Value = Callable[[Mapping[str, float]], float]
"""Of a checkpoint's metrics, larger = better."""


def current_name(metric: str) -> str:
    """Return what a metric is called today: what was `text/nll` and `text/kl` is `general/nll` and `general/kl`."""
    return f"general/{metric.removeprefix('text/')}" if metric.startswith("text/") else metric


def renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a record with today's names, also one of an earlier version.

    That counted look-alikes among the refusals of ordinary prompts, so those are left out: they have no skills there.
    """
    by_skill = any(name.startswith(f"{REFUSAL}/") for name in metrics)
    return {current_name(name): value for name, value in metrics.items() if by_skill or name != REFUSAL}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run; all but `spec` and `prompts` is called as in ``result.json``."""

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
    cost: dict[str, float] = field(default_factory=dict)
    """See `Cost.found`; empty in results of earlier versions."""

    @classmethod
    def read(cls, spec: RunSpec, path: Path) -> RunResult:
        """Read a run's ``result.json``."""
        content = json.loads(path.read_text())
        content |= {name: renamed(content[name]) for name in ("selected", "test")}
        content["trajectory"] = [renamed(record) for record in content["trajectory"]]
        return cls(spec=spec, prompts=content.pop("test_prompts"), **content)

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
            **{f"cost/{name}": value for name, value in self.cost.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one method (or variant) at its selected learning rate, one a seed."""

    label: str
    learning_rate: float | None
    results: Sequence[RunResult]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.results[0].spec.method

    def test(self, metric: str) -> tuple[float, float]:
        """Return mean and spread over seeds of a test metric."""
        return mean_and_spread([r.test[metric] for r in self.results if metric in r.test])

    def selected_means(self, rule: SelectionRule) -> dict[str, float]:
        """Return the means over seeds, on validation, of what the rule looks at."""
        return {name: fmean(r.selected[name] for r in self.results) for name in (UNSAFE, rule.metric)}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that a comparison found, and by which rules."""

    results: Sequence[RunResult]
    rule: SelectionRule
    budget: Budget
    sweep: Sweep | None
    """None for a comparison of methods."""
    planned: int
    """Runs that were asked for."""
    missing: Sequence[str] = ()
    """Names of those that are not there."""

    @cached_property
    def base(self) -> RunResult | None:
        """The untrained policy, if it was measured."""
        return next((r for r in self.results if r.spec.method == "base"), None)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Label to the runs at the selected learning rate, in the order in which labels first appear."""
        return group_results(self.results, self.rule)

    @cached_property
    def trained(self) -> dict[str, list[RunResult]]:
        """Label to all runs, the base's left out."""
        return {label: runs for label, runs in _by_label(self.results).items() if runs[0].spec.method != "base"}

    def everywhere(self, metric: str) -> bool:
        """Say whether every evaluation measured a metric."""
        return all(metric in record for r in self.results for record in r.trajectory)

    def gain(self, metrics: Mapping[str, float], *, test: bool = False) -> float:
        """Return the ability relative to the base on the same prompts; in points where it is a rate."""
        base = None if self.base is None else self.base.test if test else self.base.selected
        zero = 0.0 if base is None else self.rule.ability(base)
        return (self.rule.ability(metrics) - zero) * (1.0 if in_nats(self.rule.metric) else 100.0)


def write_csv(results: Iterable[RunResult], path: Path) -> None:
    """Write one row a run."""
    rows = [r.row() for r in results]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def group_results(results: Iterable[RunResult], rule: SelectionRule) -> dict[str, Group]:
    """Choose each method's learning rate by the same rule as its checkpoints: on validation, by the mean over seeds."""
    groups: dict[str, Group] = {}
    for label, of_label in _by_label(results).items():
        rates: dict[float | None, list[RunResult]] = {}
        for result in of_label:
            rates.setdefault(result.spec.learning_rate, []).append(result)
        most = max(len(runs) for runs in rates.values())
        complete = [Group(label=label, learning_rate=rate, results=r) for rate, r in rates.items() if len(r) == most]
        groups[label] = max(complete, key=lambda group: rule.preference(group.selected_means(rule)))
    return groups


def mean_at(runs: Sequence[RunResult], value: Value, unsafe: float) -> float:
    """Average over seeds the best value at an unsafe rate of at most ``unsafe``; -inf if a seed never got there."""
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        points.setdefault(run.spec.seed, []).extend((p[UNSAFE], value(p)) for p in run.trajectory)
    return fmean(front_at(of_seed, unsafe) for of_seed in points.values())


def _by_label(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    found: dict[str, list[RunResult]] = {}
    for result in results:
        found.setdefault(result.spec.label, []).append(result)
    return found
