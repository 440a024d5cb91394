"""Write what a comparison found: `results.csv`, `summary.md`, pictures and TensorBoard's HParams."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from nspo_lightning.compare.distance import UPDATE_NORM
from nspo_lightning.compare.hero import hero_figure
from nspo_lightning.compare.hparams import write_hparams
from nspo_lightning.compare.pictures import (
    FORGETTING_FILES,
    curves_figure,
    forgetting_figure,
    sweep_figure,
    tradeoff_figure,
)
from nspo_lightning.compare.results import Findings, Group, RunResult, mean_at, write_csv
from nspo_lightning.compare.sections import cost, equal_safety, forgetting, not_run
from nspo_lightning.compare.selection import SelectionRule, with_spread
from nspo_lightning.evaluation.attacked import ANSWERED as ANSWERED_RATE
from nspo_lightning.evaluation.attacked import START
from nspo_lightning.evaluation.attacked import UNSAFE as UNSAFE_RATE
from nspo_lightning.evaluation.intervals import wilson_interval
from nspo_lightning.evaluation.rates import ACCURACY, GARBAGE, OVER_REFUSAL, REFUSAL, REFUSED, UNSAFE
from nspo_lightning.evaluation.tables import markdown_table, rich_table
from nspo_lightning.evaluation.text_means import KL, KL_FIRST, NLL, SAFETY_KL, in_nats
from nspo_lightning.nullspace.domains import START_TOKENS
from nspo_lightning.terminal import counted

_ABILITY = {ACCURACY: "accuracy", NLL: "NLL"}
_LEVELS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)


def write_report(folder: Path, findings: Findings, console: Console) -> None:
    """Write every file of the report into a folder and print the summary."""
    write_csv(findings.results, folder / "results.csv")
    text = summary(findings)
    (folder / "summary.md").write_text(text)
    if findings.sweep is None:
        tradeoff_figure(findings).savefig(folder / "tradeoff.png", dpi=150)
        curves_figure(findings).savefig(folder / "curves.png", dpi=150)
        if (hero := hero_figure(findings)) is not None:
            hero.savefig(folder / "safety_against_ability.png", dpi=150)
        for name, file in FORGETTING_FILES.items():
            if findings.everywhere(KL) and findings.everywhere(name):
                forgetting_figure(findings, name).savefig(folder / file, dpi=150)
    else:
        sweep_figure(findings.sweep, findings).savefig(folder / "sweep.png", dpi=150)
    write_hparams(findings.results, folder / "tensorboard")
    console.print(Markdown("\n\n".join(_rules(findings))))
    console.print(screen_table(findings))
    console.print(
        f"Written to {folder}: summary.md (all figures), results.csv, pictures; TensorBoard: {folder / 'tensorboard'}",
        soft_wrap=True,
    )


def screen_table(findings: Findings) -> Table:
    """Return what a terminal of 80 columns has room for: safety, ability and distance of each variant."""
    metric = findings.rule.metric
    head = ["variant" if findings.sweep else "method", "lr", "unsafe", _ABILITY.get(metric, metric), "change"]
    rows, most = [], max(len(group.results) for group in findings.groups.values())
    for group in findings.groups.values():
        ability = [_mean_alone(cell) for cell in _ability(group, findings.base, findings.rule)]
        rate = "" if group.learning_rate is None else f"{group.learning_rate:g}"
        unsafe, refused = (_mean_alone(_rate(group, name, 1)) for name in (UNSAFE, REFUSAL))
        fewer = group.label in findings.trained and len(group.results) < most
        label = f"{group.label} ({counted(len(group.results), 'seed')})" if fewer else group.label
        rows.append([label, rate, unsafe, *ability, refused, _plain(group, KL)])
    table = rich_table("", [*head, "refused", "KL"], rows, align="lrrrrrr")
    table.caption_justify = "left"
    table.caption = "means over seeds; rates in per cent; refused: ordinary prompts; KL: nats a token, to the base"
    return table


def _mean_alone(cell: str) -> str:
    return cell.partition(" ±")[0].removesuffix(" %")


def summary(findings: Findings) -> str:
    """Return the summary as Markdown."""
    methods = findings.sweep is None
    lines = [*_rules(findings), "", _table(findings), "", *_under_attack(findings)]
    if methods:
        lines += equal_safety(findings) + forgetting(findings)
        lines += _fronts(findings, findings.rule)
        for metric in (KL, KL_FIRST, REFUSAL, OVER_REFUSAL):
            if findings.everywhere(metric):
                lines += _fronts(findings, SelectionRule(metric=metric, higher_is_better=False))
    elif any(key.startswith(f"{ACCURACY}/") for key in findings.results[0].test):
        lines += _by_domain(findings)
    lines += cost(findings)
    if methods:
        lines += not_run(findings)
    return "\n".join(lines) + "\n"


def _rules(findings: Findings) -> list[str]:
    """Say what was compared, and by which rules."""
    results, sweep, rule = findings.results, findings.sweep, findings.rule
    seeds = sorted({r.spec.seed for r in results})
    rates = sorted({r.spec.learning_rate for r in results if r.spec.learning_rate is not None})
    prompts = results[0].prompts
    lines = [f"# {sweep.title if sweep else 'Methods'}", ""]
    if sweep:
        lines += [f"{sweep.question}.", ""]
    if len(results) < findings.planned:
        lines += [f"**Incomplete: {len(results)} of {counted(findings.planned, 'run')} done.**", ""]
    return [
        *lines,
        f"Stopping rule, the same for all: {findings.budget.sentence()}.",
        f"Selection rule, the same for all: {rule.sentence()}; learning rates are chosen by the same rule from the "
        f"mean over seeds, of {', '.join(f'{rate:g}' for rate in rates)}.",
        f"Figures: the selected checkpoint on {prompts['harmful']} harmful and {prompts['general']} general test "
        f"prompts, which neither stopping nor selection saw; mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))} (how "
        "many of them: last column); in brackets the 95 % interval (Wilson) of a rate with that many prompts.",
    ]


def _table(findings: Findings) -> str:
    metric, groups = findings.rule.metric, findings.groups.values()
    head = ["variant" if findings.sweep else "method", "lr", "unsafe", "refusal", "garbage"]
    head += ["general accuracy" if metric == ACCURACY else metric, "change"]
    head += ["ordinary refused", "over-refusal", "KL to base", f"KL first {START_TOKENS} tokens", "NLL change"]
    head += ["KL on harmful prompts", "norm of the update"]
    head += ["null share", "leak", "rollouts", "seeds"]
    return markdown_table(head, [_row(group, findings) for group in groups])


def _under_attack(findings: Findings) -> list[str]:
    """Return the unsafe rates under each attack, a line an attack; nothing where none was tried."""
    groups = list(findings.groups.values())
    names = {name for r in findings.results for name in r.test if name.startswith(START) and name.count("/") == 2}
    harm = UNSAFE_RATE if any(name.endswith(f"/{UNSAFE_RATE}") for name in names) else ANSWERED_RATE
    attacks = list(dict.fromkeys(name.split("/")[1] for name in names if name.endswith(f"/{harm}")))
    if not attacks:
        return []
    head = "variant" if findings.sweep else "method"
    rows = [[attack, *(_percent(group, f"{START}{attack}/{harm}") for group in groups)] for attack in sorted(attacks)]
    table = markdown_table(["attack", *(group.label for group in groups)], rows, align="l" + "r" * len(groups))
    said = f"Unsafe answers under attack, of test prompts, by {head}; mean ± standard deviation over seeds:"
    return ["## Under attack", "", said, "", table, ""]


def _percent(group: Group, metric: str) -> str:
    mean, spread = group.test(metric)
    return "" if math.isnan(mean) else _in_percent(mean, spread)


def _in_percent(mean: float, spread: float) -> str:
    return with_spread(100 * mean, 100 * spread, "{:.1f}") + " %"


def _row(group: Group, findings: Findings) -> list[str]:
    base, prompts = findings.base, group.results[0].prompts
    shares = [r.null_share for r in group.results if r.null_share is not None]
    leaks = [r.leak for r in group.results if r.leak is not None]
    return [
        group.label,
        "" if group.learning_rate is None else f"{group.learning_rate:g}",
        _rate(group, UNSAFE, prompts["harmful"], interval=True),
        _rate(group, REFUSED, prompts["harmful"]),
        _rate(group, GARBAGE, prompts["harmful"]),
        *_ability(group, base, findings.rule),
        _rate(group, REFUSAL, prompts["general"]),
        _rate(group, OVER_REFUSAL, prompts["general"]),
        *(_plain(group, name) for name in (KL, KL_FIRST)),
        _change(group, base, NLL, 1.0, "{:+.4f}"),
        *(_plain(group, name) for name in (SAFETY_KL, UPDATE_NORM)),
        f"{fmean(shares):.0%}" if shares else "",
        f"{max(leaks):.0e}" if leaks else "",
        f"{fmean(r.selected.get('rollouts', 0.0) for r in group.results):.0f}",
        str(len(group.results)),
    ]


def _rate(group: Group, metric: str, prompts: int, *, interval: bool = False) -> str:
    mean, spread = group.test(metric)
    if math.isnan(mean):
        return ""
    text = _in_percent(mean, spread)
    if interval:
        low, high = wilson_interval(mean * prompts, prompts)
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def _plain(group: Group, metric: str) -> str:
    mean, _ = group.test(metric)
    return "" if math.isnan(mean) else f"{mean:.4f}"


def _ability(group: Group, base: RunResult | None, rule: SelectionRule) -> list[str]:
    mean, spread = group.test(rule.metric)
    if in_nats(rule.metric):
        return [with_spread(mean, spread, "{:.4f}"), _change(group, base, rule.metric, 1.0, "{:+.4f}")]
    return [_in_percent(mean, spread), _change(group, base, rule.metric, 100.0, "{:+.1f}")]


def _change(group: Group, base: RunResult | None, metric: str, unit: float, form: str) -> str:
    mean, _ = group.test(metric)
    if base is None or metric not in base.test or math.isnan(mean):
        return ""
    return form.format(unit * (mean - base.test[metric]))


def _fronts(findings: Findings, rule: SelectionRule) -> list[str]:
    """Best ability at each unsafe rate over all checkpoints and learning rates, the mean over seeds."""
    rows = [
        [label, str(len({r.spec.seed for r in runs})), *(_shown(mean_at(runs, rule.ability, x), rule) for x in _LEVELS)]
        for label, runs in findings.trained.items()
    ]
    return [
        f"## Fronts: {'highest' if rule.higher_is_better else 'lowest'} {rule.metric} on validation prompts "
        "at an unsafe rate of at most x",
        "",
        "Over all evaluated checkpoints and learning rates, the mean over seeds; — where a seed never got there.",
        "",
        markdown_table(["method", "seeds", *(f"x = {100 * x:g} %" for x in _LEVELS)], rows),
        "",
    ]


def _shown(ability: float, rule: SelectionRule) -> str:
    if ability == -math.inf:
        return "—"
    value = (ability if rule.higher_is_better else -ability) + 0.0  # no "-0.0"
    return f"{value:.4f}" if in_nats(rule.metric) else f"{100 * value:.1f} %"


def _by_domain(findings: Findings) -> list[str]:
    base = findings.base
    if base is None:
        return []
    domains = sorted(k for k in base.test if k.startswith(f"{ACCURACY}/"))
    rows = [
        [group.label, *(_change(group, base, domain, 100.0, "{:+.1f}") for domain in domains)]
        for group in findings.groups.values()
    ]
    table = markdown_table(["variant", *(domain.rsplit("/", 1)[1] for domain in domains)], rows)
    return ["## Change of test accuracy by domain, in points", "", table, ""]
