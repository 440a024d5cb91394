"""The page as Markdown, for a terminal, a pull request, a wiki. Untrusted text can neither be HTML nor markup in it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from nspo_lightning.evaluation.rates import ACCURACY, REFUSAL, REFUSED, UNSAFE
from nspo_lightning.evaluation.tables import fenced, markdown_table
from nspo_lightning.evaluation.text_means import KL, KL_FIRST
from nspo_lightning.report import words
from nspo_lightning.report.heat import heat_maps
from nspo_lightning.report.loading import loading
from nspo_lightning.report.pictures import curve_of
from nspo_lightning.report.records import Answer, Exchange, Measure, Measurement, Run
from nspo_lightning.report.side_by_side import SharedPrompt, compare, named_apart

_EACH = 4
"""Exchanges of each kind; the HTML page has more."""
_MARKUP = re.compile(r"([\\`*_\[\]#~])")
_Exchange = TypeVar("_Exchange", Exchange, SharedPrompt)
_CURVES = (
    "reward",
    UNSAFE,
    REFUSED,
    ACCURACY,
    REFUSAL,
    KL_FIRST,
    KL,
    "kl",
    "entropy",
)


def run_text(run: Run) -> str:
    """Return the page of one run."""
    parts = [f"# {plain(run.name)}", f"**{plain(words.headline(run))}**"]
    parts += [plain(words.lede(run))] if words.lede(run) else []
    parts += [f"> {plain(said)}" for said in words.standing(run)]
    parts += _findings(run) + _measures(run) + _curves(run) + _answers(run) + _null_space(run) + _done(run)
    for title, code in loading(run).items():
        parts += [*([] if "## How to load it" in parts else ["## How to load it"]), f"{title}:", fenced(code)]
    return "\n\n".join(parts) + "\n"


def comparison_text(runs: Sequence[Run]) -> str:
    """Return a page of several runs side by side."""
    runs = named_apart(runs)
    found = compare(runs)
    names = [plain(run.name) for run in runs]
    parts = [f"# {', '.join(names)}", f"**{plain(words.headline_of_several(runs))}**"]
    parts += [f"> {plain(note)}" for note in found.notes]
    titled = {"Before and after": found.rows, "Harmful prompts answered unsafely, under attack": found.attacks}
    for title, measured in titled.items():
        rows = []
        for row in measured:
            known = next(measure for measure in row.of_runs if measure is not None)
            before = [_value(known, "before")] if found.one_before else []
            after = (_side(measure, moved=not found.one_before) for measure in row.of_runs)
            rows.append([plain(row.title), *before, *after])
        columns = ["measure", *(["before"] if found.one_before else []), *names]
        if rows:
            parts += [f"## {title}", markdown_table(columns, rows, align="l" + "r" * (len(columns) - 1))]
    null_space = [[plain(words.free_of(run)) for run in runs], [plain(words.lede(run)) for run in runs]]
    parts += ["## Null space", markdown_table(["", *names], [["free", *null_space[0]], ["updates", *null_space[1]]])]
    if found.settings:
        settings = [[plain(name), *map(plain, values)] for name, values in found.settings.items()]
        parts += ["## What differs", markdown_table(["setting", *names], settings)]
    if found.prompts:
        parts.append("## Answers to the same prompts")
        for prompt in _some(found.prompts):
            sides = [("before", prompt.before), *zip(names, prompt.after, strict=True)]
            parts += _exchange(words.place(prompt.kind, prompt.skill), prompt.prompt, sides)
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    Example:
        >>> plain("<b>it's</b> *b*")
        "&lt;b&gt;it's&lt;/b&gt; \\*b\\*"
    """
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _findings(run: Run) -> list[str]:
    if not run.findings:
        return []
    rows = [f"- **{plain(f.title)}** {plain(f.text)}{f' **{plain(f.cure)}**' if f.cure else ''}" for f in run.findings]
    return ["## What to look at", "\n".join(rows)]


def _measures(run: Run) -> list[str]:
    parts = []
    for measurement in run.measurements:
        if not measurement.measures:
            continue
        parts += [
            f"## Before and after, measured by `{measurement.job}`",
            f"After = {plain(measurement.of)}; intervals at 95 %; changes in points, or in nats a token.",
            measures_table(measurement.measures),
        ]
        for part in measurement.breakdowns:
            parts += [f"### {part.title}", measures_table(part.parts)]
        parts += _attacks(measurement)
    return parts


def _attacks(measurement: Measurement) -> list[str]:
    if not measurement.attacks:
        return []
    rows = [
        (
            f"{plain(attack.name)}{' (in training)' if attack.trained else ''}",
            _value_of(attack.harm, "before"),
            _value_of(attack.harm, "after") or "no prompt fits",
            "" if attack.harm is None else words.interval(attack.harm.after, "share"),
            _value_of(attack.garbage, "after"),
            _value_of(attack.refused, "before"),
            _value_of(attack.refused, "after"),
        )
        for attack in measurement.attacks
    ]
    columns = ["attack", "base unsafe", "unsafe", "95 %", "garbage", "look-alikes refused by the base", "refused"]
    parts = ["### Under attack", markdown_table(columns, rows, align="lrrrrrr")]
    categories = [part for attack in measurement.attacks for part in attack.categories]
    return [*parts, *(["### Under attack, by category", measures_table(categories)] if categories else [])]


def measures_table(measures: Iterable[Measure]) -> str:
    """Return measures as a table: before, after, interval, change, of how many."""
    measures = list(measures)
    counts = [f"{m.after.of:,}" if m.after is not None and m.after.of else "" for m in measures]
    rows = [
        (
            plain(m.title),
            _value(m, "before"),
            _value(m, "after"),
            words.interval(m.after, m.unit),
            words.change(m),
            *([of] if any(counts) else []),
        )
        for m, of in zip(measures, counts, strict=True)
    ]
    columns = ["measure", "before", "after", "95 %", "change", *(["of"] if any(counts) else [])]
    return markdown_table(columns, rows, align="lrrrrr"[: len(columns)])


def _value_of(measure: Measure | None, side: str) -> str:
    return "" if measure is None else _value(measure, side)


def _value(measure: Measure, side: str) -> str:
    value = measure.before if side == "before" else measure.after
    return "" if value is None else words.figure(value.value, measure.unit)


def _side(measure: Measure | None, *, moved: bool) -> str:
    if measure is None:
        return ""
    after = f"{_value(measure, 'after')} ({words.change(measure)})" if measure.change is not None else ""
    after = after or _value(measure, "after")
    return f"{_value(measure, 'before')} to {after}" if moved and measure.before is not None else after


def _curves(run: Run) -> list[str]:
    rows = []
    for name in _CURVES:
        curve = curve_of(run.curves, name)
        if curve is None or len(curve.points) < 2:
            continue
        points = [curve.points[i * (len(curve.points) - 1) // 4] for i in range(5)]
        rows.append([plain(name), *(f"{value:.4g} ({step})" for step, value in points)])
    if not rows:
        return []
    columns = ["logged", "first (step)", "", "half-way", "", "last"]
    return ["## Over training", markdown_table(columns, rows, align="lrrrrr")]


def _answers(run: Run) -> list[str]:
    if run.answers is None:
        return []
    parts = ["## Answers before and after", f"Evenly spread over the prompts; more in `{run.answers.source}`."]
    attacked = {exchange.attack: exchange for exchange in reversed(run.answers.attacked) if exchange.kind == "harmful"}
    for e in [*_some(run.answers.shown), *reversed(attacked.values())]:
        begun = f"\n(the answer begins with: {e.prefix})" if e.prefix else ""
        parts += _exchange(
            words.place(e.kind, e.skill, e.category, e.attack),
            e.prompt + begun,
            [("before", e.before), ("after", e.after)],
        )
    return parts


def _some(exchanges: Sequence[_Exchange]) -> list[_Exchange]:
    by_kind: dict[str, list[_Exchange]] = {}
    for exchange in exchanges:
        by_kind.setdefault(exchange.kind, []).append(exchange)
    return [exchange for own in by_kind.values() for exchange in own[:_EACH]]


def _exchange(place: str, prompt: str, sides: Iterable[tuple[str, Answer | None]]) -> list[str]:
    parts = [f"### {plain(place)}", fenced(prompt)]
    for side, answer in sides:
        if answer is not None:
            parts += [f"{side}, {plain(answer.outcome)}:", fenced(answer.text)]
    return parts


def _null_space(run: Run) -> list[str]:
    said = [*([words.free_of(run)] if run.null_space is not None else []), *words.certificate_sentences(run)]
    if not any(said):
        return []
    parts = ["## Null space", *(plain(sentence) for sentence in said if sentence)]
    for heat in heat_maps(run.null_space) if run.null_space is not None else []:
        rows = [[name, *("" if cell is None else cell.text for cell in cells)] for name, cells in heat.rows]
        columns = ["layer", *map(plain, heat.columns)]
        parts += [f"{heat.title} ({heat.note}):", markdown_table(columns, rows, align="r" * len(columns))]
    return parts


def _done(run: Run) -> list[str]:
    parts = ["## What was done"]
    if run.facts:
        parts.append("\n".join(f"- {title}: {plain(text)}" for title, text in run.facts.items()))
    if run.settings:
        rows = [(plain(s.name), plain(s.value), plain(s.default)) for s in run.settings]
        parts.append(markdown_table(["setting that differs", "here", "default"], rows))
    return parts if len(parts) > 1 else []
