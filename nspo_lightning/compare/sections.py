"""Sections of a comparison's summary: methods at equal safety, what they cost, and what was not run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from nspo_lightning.compare.distance import UPDATE_NORM
from nspo_lightning.compare.equal_safety import (
    Cut,
    Reached,
    cut_at,
    paired_difference,
    paired_seeds,
    reached,
    shares_of_best,
)
from nspo_lightning.compare.law import fit_law, points
from nspo_lightning.compare.methods import LEARNING_RATES, METHODS
from nspo_lightning.compare.results import Findings, RunResult, Value
from nspo_lightning.compare.selection import SelectionRule, with_spread
from nspo_lightning.evaluation.rates import OVER_REFUSAL, REFUSAL
from nspo_lightning.evaluation.tables import markdown_table
from nspo_lightning.evaluation.text_means import KL, KL_FIRST, SAFETY_KL
from nspo_lightning.nullspace.domains import START_TOKENS

CUTS = (0.1, 0.05)
"""Unsafe rates at which methods are compared."""
_LISTED = 12
"""Missing runs that are named one by one, at most."""
_FRONT_CUTS = (0.02, 0.03, 0.05, 0.1, 0.2)
NEAREST = SelectionRule(metric=KL, higher_is_better=False)
"""What is nearest to the base is the best; what has no KL that is a number is the worst."""
_REFERENCES = ("nspo", "grpo")
"""Methods that the others are held against, where they were run."""


def equal_safety(findings: Findings) -> list[str]:
    """Compare the methods at the same unsafe rates, by the KL on general text where it was measured."""
    value = NEAREST.ability if findings.everywhere(KL) else findings.rule.ability
    chosen_by = "KL to the base on general text" if findings.everywhere(KL) else findings.rule.metric
    levels = [_reached(findings, value, cut) for cut in _FRONT_CUTS]
    seeds = _listed(paired_seeds(levels))
    lines = [
        "## At equal safety",
        "",
        f"Validation prompts. For each method the learning rate, and for each seed the checkpoint, with the best "
        f"{chosen_by} among those that are at most so unsafe; steps: the fewest that any rate needs. Means are over "
        "the method's own seeds. Differences, and steps to GRPO's, are over the seeds that both have, mean ± standard "
        f"deviation. P: share of the bootstrap resamples of seeds {seeds} in which the method's mean is the best "
        "(there are few with few seeds); empty where it was not run at all of these.",
        "",
    ]
    for cut in CUTS:
        lines += [f"At most {100 * cut:g} % unsafe:", "", _cut_table(findings, value, cut), ""]
    front = shares_of_best(levels)
    cuts = ", ".join(f"{100 * cut:g}" for cut in _FRONT_CUTS)
    lines += [f"Bootstrap probability of being the best at one of {cuts} % unsafe at least (on the front):", ""]
    ordered = sorted(front.items(), key=lambda pair: -pair[1])
    return [*lines, markdown_table(["method", "P(front)"], [[name, f"{p:.2f}"] for name, p in ordered]), ""]


def _cut_table(findings: Findings, value: Value, unsafe: float) -> str:
    trained = findings.trained
    cuts = {label: cut_at(runs, value, unsafe) for label, runs in trained.items()}
    best = shares_of_best([_reached(findings, value, unsafe)])
    by_method = {runs[0].spec.method: label for label, runs in trained.items()}
    references: dict[str, Cut] = {}
    for method in _REFERENCES:
        label = by_method.get(method, "")
        if (reference := cuts.get(label)) is not None:
            references[label] = reference
    plain = by_method.get("grpo")
    head = ["method", "lr", "seeds", "KL", *(f"KL less {label}'s" for label in references), "P"]
    head += [f"KL first {START_TOKENS}", "ordinary refused", "over-refusal", "norm", "KL on harmful"]
    head += ["steps", "to GRPO's"]
    rows = []
    for label, cut in cuts.items():
        if cut is None:
            rows.append([label, *["—"] * (len(head) - 1)])
            continue
        differences = [paired_difference(cut, other, KL) for other in references.values()]
        steps = _fewest_steps(trained[label], unsafe)
        rows.append([
            label,
            f"{cut.learning_rate:g}",
            str(len(cut.checkpoints)),
            _number(cut.mean(KL), "{:.4f}"),
            *("" if math.isnan(mean) else with_spread(mean, spread, "{:+.4f}") for mean, spread in differences),
            _number(best.get(label, math.nan), "{:.2f}"),
            _number(cut.mean(KL_FIRST), "{:.4f}"),
            *(_number(100 * cut.mean(name), "{:.1f} %") for name in (REFUSAL, OVER_REFUSAL)),
            _number(cut.mean(UPDATE_NORM), "{:.2f}"),
            _number(cut.mean(SAFETY_KL), "{:.3f}"),
            _number(steps, "{:.0f}"),
            "" if plain is None else _number(_steps_ratio(trained[label], trained[plain], unsafe), "{:.2f}"),
        ])
    return markdown_table(head, rows)


def _reached(findings: Findings, value: Value, unsafe: float) -> dict[str, Reached]:
    return {label: reached(runs, value, unsafe) for label, runs in findings.trained.items()}


def _fewest_steps(runs: Sequence[RunResult], unsafe: float) -> float:
    """Return the mean over seeds of the steps to a cut, at the learning rate that needs the fewest; NaN for none."""
    cut = cut_at(runs, lambda p: -p["steps"], unsafe) if runs else None
    return math.nan if cut is None else cut.mean("steps")


def _steps_ratio(runs: Sequence[RunResult], plain: Sequence[RunResult], unsafe: float) -> float:
    """Return the steps to a cut over those of other runs, at the seeds that both have; NaN where one never gets there.

    So that a method with one seed is not held against another's mean over three.
    """
    common = {run.spec.seed for run in runs} & {run.spec.seed for run in plain}
    ours, theirs = (_fewest_steps([run for run in which if run.spec.seed in common], unsafe) for which in (runs, plain))
    return ours / theirs


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def forgetting(findings: Findings) -> list[str]:
    """Say whether forgetting follows the norm of the update, or the KL on harmful prompts, and who breaks the rule."""
    if not findings.everywhere(KL):
        return []
    laws = {}
    for name, title in ((UPDATE_NORM, "norm of the update"), (SAFETY_KL, "KL on harmful prompts")):
        if findings.everywhere(name):
            by_label = {label: points(runs, name, KL) for label, runs in findings.trained.items()}
            common = {label for label, runs in findings.trained.items() if not runs[0].spec.is_projected}
            law = fit_law(
                {label: found for label, found in by_label.items() if label in common},
                {label: found for label, found in by_label.items() if label not in common},
            )
            if law is not None:
                laws[title] = law
    if not laws:
        return []
    lines = [
        "## Forgetting against distance",
        "",
        "A line through log KL on general text of all checkpoints of the methods without a projection; for each method "
        "the geometric mean of its checkpoints' KL over the line's at the same distance (1 = on the common curve, 0.1: "
        "ten times less forgotten). "
        + "; ".join(f"{title}: slope {law.slope:.2f}, R² {law.explained:.2f}" for title, law in laws.items())
        + ".",
        "",
    ]
    rows = [
        [label, *(_number(law.factors.get(label, math.nan), "{:.2f}") for law in laws.values())]
        for label in findings.trained
    ]
    return [*lines, markdown_table(["method", *(f"at the same {title}" for title in laws)], rows), ""]


def cost(findings: Findings) -> list[str]:
    """Say what each method takes a step, before the first one, and in memory; nothing where it was not measured."""
    rows = []
    grpo = _mean_cost(findings, METHODS["grpo"].label, "step_cpu_seconds")
    names = ("step_cpu_seconds", "step_seconds", "setup_seconds")
    for label in findings.trained:
        values = {name: _mean_cost(findings, label, name) for name in names}
        if math.isnan(values["step_seconds"]):
            continue
        rows.append([
            label,
            f"{values['step_seconds']:.2f}",
            f"{values['step_cpu_seconds']:.2f}",
            _number(100 * (values["step_cpu_seconds"] / grpo - 1), "{:+.0f} %"),
            f"{values['setup_seconds']:.0f}",
            f"{_mean_cost(findings, label, 'held_bytes') / 2**20:.1f}",
            _number(_mean_cost(findings, label, "peak_bytes") / 2**30, "{:.2f}"),
        ])
    if not rows:
        return []
    head = ["method", "seconds a step", "CPU seconds", "to GRPO", "seconds before the first", "MiB held", "GPU GiB"]
    note = "Means over all runs; validation is left out. Held: bases, gradients or text, on one rank."
    return ["## Cost", "", note, "", markdown_table(head, rows), ""]


def _mean_cost(findings: Findings, label: str, name: str) -> float:
    values = [run.cost[name] for run in findings.trained.get(label, []) if name in run.cost]
    return fmean(values) if values else math.nan


def not_run(findings: Findings) -> list[str]:
    """List what a reader might look for and will not find."""
    found = {r.spec.method for r in findings.results}
    rates = {r.spec.learning_rate for r in findings.results if r.spec.learning_rate is not None}
    seeds = {r.spec.seed for r in findings.results}
    lines = [f"Methods: {', '.join(sorted(set(METHODS) - found))}."] if set(METHODS) - found else []
    if findings.missing:
        lines.append(f"Runs of this plan that are not done, or failed: {_missing(findings.missing)}.")
    if len(rates) < len(LEARNING_RATES):
        lines.append(f"Other learning rates than {_listed(sorted(rates))}: four are the default.")
    if len(seeds) < 3:
        lines.append(f"Other seeds than {_listed(sorted(seeds))}: three are the least for a claim.")
    edges = [label for label, group in findings.groups.items() if _at_edge(group.learning_rate, rates)]
    if edges and len(rates) > 2:
        lines.append(f"A rate beyond the grid, where the edge of it was chosen: {', '.join(edges)}.")
    return ["## What was not run", "", *(f"- {line}" for line in lines), ""] if lines else []


def _missing(names: Sequence[str]) -> str:
    """List runs by name, and many by what they are runs of (without rate and seed)."""
    if len(names) <= _LISTED:
        return ", ".join(names)
    counts = Counter(name.rpartition("-seed")[0].partition("-lr")[0] for name in names)
    return f"{len(names)}, of " + ", ".join(f"{name} ({count})" for name, count in counts.items())


def _at_edge(rate: float | None, rates: set[float]) -> bool:
    return rate is not None and rate in (min(rates), max(rates))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
