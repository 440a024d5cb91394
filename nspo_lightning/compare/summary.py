"""Write what a comparison found: `results.csv`, `summary.md`, pictures and TensorBoard's HParams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from nspo_lightning.compare.hparams import write_hparams
from nspo_lightning.compare.pictures import curves_figure, sweep_figure, tradeoff_figure
from nspo_lightning.compare.plan import Budget
from nspo_lightning.compare.results import Group, RunResult, group_results, write_csv
from nspo_lightning.compare.selection import UNSAFE, SelectionRule, front_at, mean_and_spread
from nspo_lightning.compare.sweeps import Sweep
from nspo_lightning.evaluation.intervals import wilson_interval

_REFUSAL, _GARBAGE, _OVER = "safety/refusal_rate", "safety/garbage_rate", "general/over_refusal_rate"
_LEVELS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)


def write_report(
    folder: Path,
    results: Sequence[RunResult],
    *,
    rule: SelectionRule,
    budget: Budget,
    sweep: Sweep | None,
    planned: int,
    console: Console,
) -> None:
    """Write every file of the report and print the summary.

    Args:
        folder: Where to.
        results: The finished runs.
        rule: How checkpoints and learning rates were selected.
        budget: When runs stopped.
        sweep: What was swept, None for a comparison of methods.
        planned: Runs that were asked for.
        console: Where the summary is shown.
    """
    write_csv(results, folder / "results.csv")
    base = next((r for r in results if r.spec.method == "base"), None)
    groups = group_results(results, rule)
    text = summary(groups, results, base, rule=rule, budget=budget, sweep=sweep, planned=planned)
    (folder / "summary.md").write_text(text)
    if sweep is None:
        tradeoff_figure(results, groups, base, rule).savefig(folder / "tradeoff.png", dpi=150)
        curves_figure(groups, base, rule).savefig(folder / "curves.png", dpi=150)
    else:
        sweep_figure(sweep, groups, base, rule).savefig(folder / "sweep.png", dpi=150)
    write_hparams(results, folder / "tensorboard")
    console.print(Markdown(text))
    console.print(f"Written to {folder}: results.csv, summary.md, pictures; TensorBoard: {folder / 'tensorboard'}")


def summary(
    groups: Mapping[str, Group],
    results: Sequence[RunResult],
    base: RunResult | None,
    *,
    rule: SelectionRule,
    budget: Budget,
    sweep: Sweep | None,
    planned: int,
) -> str:
    """Return the summary as Markdown.

    Args:
        groups: The runs by label, at the selected learning rate.
        results: All runs.
        base: The base's measurement.
        rule: How checkpoints and learning rates were selected.
        budget: When runs stopped.
        sweep: What was swept.
        planned: Runs that were asked for.

    Returns:
        The text.
    """
    seeds = sorted({r.spec.seed for r in results})
    prompts = results[0].prompts
    lines = [f"# {sweep.title if sweep else 'Methods'}", ""]
    if sweep:
        lines += [f"{sweep.question}.", ""]
    if len(results) < planned:
        lines += [f"**Incomplete: {len(results)} of {planned} runs are done.**", ""]
    lines += [
        f"Stopping rule, the same for all: {budget.sentence()}.",
        f"Selection rule, the same for all: {rule.sentence()}; learning rates are chosen by the same rule from the "
        f"mean over seeds, of {', '.join(f'{r:g}' for r in _rates(results))}.",
        f"Figures: the selected checkpoint on {prompts['harmful']} harmful and {prompts['general']} general test "
        f"prompts, which neither stopping nor selection saw; mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}; in brackets the 95 % interval (Wilson) of a rate with that many prompts.",
        "",
        *_table(groups, base, rule, sweep),
        "",
    ]
    if sweep is None:
        lines += _fronts(results, rule)
        for metric in ("text/kl", _OVER):
            if all(metric in p for r in results for p in r.trajectory):
                lines += _fronts(results, SelectionRule(metric=metric, higher_is_better=False))
    elif any(key.startswith("general/accuracy/") for key in results[0].test):
        lines += _by_domain(groups, base)
    return "\n".join(lines) + "\n"


def _rates(results: Sequence[RunResult]) -> list[float]:
    return sorted({r.spec.learning_rate for r in results if r.spec.learning_rate is not None})


def _table(groups: Mapping[str, Group], base: RunResult | None, rule: SelectionRule, sweep: Sweep | None) -> list[str]:
    name = "general accuracy" if rule.metric == "general/accuracy" else rule.metric
    head = ["variant" if sweep else "method", "lr", "unsafe", "refusal", "garbage", name, "change", "over-refusal"]
    has_text = any("text/kl" in r.test for g in groups.values() for r in g.results)
    head += ["KL to base", "NLL change"] if has_text else []
    head += ["null share", "leak", "rollouts", "seeds"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups.values():
        first = group.results[0]
        cells = [group.label, "" if group.learning_rate is None else f"{group.learning_rate:g}"]
        cells += [_rate(group, UNSAFE, first.prompts["harmful"], interval=True)]
        cells += [_rate(group, metric, first.prompts["harmful"]) for metric in (_REFUSAL, _GARBAGE)]
        cells += _ability(group, base, rule)
        cells += [_rate(group, _OVER, first.prompts["general"])]
        if has_text:
            cells += [f"{group.test('text/kl')[0]:.4f}", _change(group, base, "text/nll", 1.0, "{:+.4f}")]
        shares = [r.null_share for r in group.results if r.null_share is not None]
        leaks = [r.leak for r in group.results if r.leak is not None]
        cells += [f"{mean_and_spread(shares)[0]:.0%}" if shares else "", f"{max(leaks):.0e}" if leaks else ""]
        rollouts = [r.selected.get("rollouts", 0.0) for r in group.results]
        cells += [f"{mean_and_spread(rollouts)[0]:.0f}", str(len(group.results))]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _rate(group: Group, metric: str, prompts: int, *, interval: bool = False) -> str:
    mean, spread = group.test(metric)
    if mean != mean:
        return ""
    text = f"{100 * mean:.1f} ± {100 * spread:.1f} %"
    if interval:
        low, high = wilson_interval(mean * prompts, prompts)
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def _ability(group: Group, base: RunResult | None, rule: SelectionRule) -> list[str]:
    mean, spread = group.test(rule.metric)
    if rule.metric.startswith("text/"):
        return [f"{mean:.4f} ± {spread:.4f}", _change(group, base, rule.metric, 1.0, "{:+.4f}")]
    return [f"{100 * mean:.1f} ± {100 * spread:.1f} %", _change(group, base, rule.metric, 100.0, "{:+.1f}")]


def _change(group: Group, base: RunResult | None, metric: str, unit: float, form: str) -> str:
    if base is None or metric not in base.test:
        return ""
    return form.format(unit * (group.test(metric)[0] - base.test[metric]))


def _fronts(results: Sequence[RunResult], rule: SelectionRule) -> list[str]:
    """Best ability at each unsafe rate over all checkpoints and learning rates, the mean over seeds."""
    sign = 1.0 if rule.higher_is_better else -1.0
    lines = [
        f"## Fronts: {'highest' if rule.higher_is_better else 'lowest'} {rule.metric} on validation prompts "
        "at an unsafe rate of at most x",
        "",
        "Over all evaluated checkpoints and learning rates, the mean over seeds; — where a seed never got there.",
        "",
        "| method | " + " | ".join(f"x = {100 * x:g} %" for x in _LEVELS) + " |",
        "|---|" + "---|" * len(_LEVELS),
    ]
    for label in dict.fromkeys(r.spec.label for r in results if r.spec.method != "base"):
        cells = []
        for level in _LEVELS:
            bests = []
            for seed in sorted({r.spec.seed for r in results if r.spec.label == label}):
                runs = [r for r in results if r.spec.label == label and r.spec.seed == seed]
                points = [(p[UNSAFE], rule.ability(p)) for r in runs for p in r.trajectory]
                bests.append(front_at(points, level))
            mean = mean_and_spread(bests)[0]
            shown = f"{sign * mean:.4f}" if rule.metric.startswith("text/") else f"{100 * sign * mean:.1f} %"
            cells.append("—" if mean == float("-inf") else shown)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _by_domain(groups: Mapping[str, Group], base: RunResult | None) -> list[str]:
    """Change of accuracy by domain."""
    if base is None:
        return []
    domains = sorted(k for k in base.test if k.startswith("general/accuracy/"))
    lines = [
        "## Change of test accuracy by domain, in points",
        "",
        "| variant | " + " | ".join(d.rsplit("/", 1)[1] for d in domains) + " |",
        "|---|" + "---|" * len(domains),
    ]
    for group in groups.values():
        cells = [_change(group, base, domain, 100.0, "{:+.1f}") for domain in domains]
        lines.append(f"| {group.label} | " + " | ".join(cells) + " |")
    return [*lines, ""]
