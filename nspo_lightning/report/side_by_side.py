"""Several runs side by side: measures in rows, runs in columns, and what they were told differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nspo_lightning.report.exchanges import SHOWN
from nspo_lightning.report.measurements import TITLES
from nspo_lightning.report.records import Answer, Measure, Run
from nspo_lightning.report.words import STAYED


@dataclass(frozen=True, kw_only=True)
class MeasureRow:
    """A measure of each run; None where it was not taken."""

    name: str
    title: str
    of_runs: tuple[Measure | None, ...]


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """A prompt that more than one run has answered: what was said before, if it is the same, and what each run says."""

    kind: str
    skill: str
    prompt: str
    before: Answer | None
    after: tuple[Answer | None, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of it.

    Attributes:
        notes: What a reader must know before comparing.
        one_before: Whether one column "before" holds for all runs.
        rows: Measures.
        attacks: Harmful prompts that are answered unsafely under each attack, in the runs' order.
        settings: Name of a setting -> its value in each run; those that are not the same everywhere.
        prompts: Answered by at least two runs.
    """

    notes: tuple[str, ...]
    one_before: bool
    rows: tuple[MeasureRow, ...]
    attacks: tuple[MeasureRow, ...]
    settings: dict[str, tuple[str, ...]]
    prompts: tuple[SharedPrompt, ...]


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side."""
    runs = named_apart(runs)
    bases, notes = _bases(runs), list[str]()
    if len(bases) > 1:
        notes.append(
            f"These runs have different bases ({'; '.join(bases)}): compare how far each has moved from its own, not "
            "the levels, and no answers."
        )
    rows, attacks = _rows(runs), _attack_rows(runs)
    alike = all(_one_before(row) for row in (*rows, *attacks))
    if len(bases) == 1 and not alike:
        notes.append(
            "Their figures before are not the same (another start, other held-out prompts, or another job): each run "
            "stands with its own."
        )
    jobs = {run.name: run.measured.job for run in runs if run.measured is not None}
    if len(set(jobs.values())) > 1:
        said = ", ".join(f"{name}: {job}" for name, job in jobs.items())
        notes.append(f"The figures are of different jobs, which may have other prompts ({said}).")
    notes += [f"{run.name} was not measured: its columns are empty." for run in runs if run.measured is None]
    notes += [f"{run.name} is not finished." for run in runs if not run.finished and not run.measurements]
    notes += [
        f"{run.name} was trained on after step {run.steps}, which its figures are of, and is not finished."
        for run in runs
        if run.finished and run.went_on
    ]
    return Comparison(
        notes=tuple(notes),
        one_before=len(bases) == 1 and alike,
        rows=tuple(rows),
        attacks=tuple(attacks),
        settings=_settings(runs),
        prompts=tuple(_prompts(runs)) if len(bases) == 1 else (),
    )


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """Return runs whose names all differ: those that share one are called by their folders."""
    counts = Counter(run.name for run in runs)
    return [run if counts[run.name] == 1 else replace(run, name=run.folder.as_posix()) for run in runs]


def _bases(runs: Sequence[Run]) -> list[str]:
    """Return the different bases: by their names, and by what else tells them apart where those are the same."""
    names = dict.fromkeys(run.base or "?" for run in runs)
    kinds = dict.fromkeys((run.base or "?", run.variety) for run in runs)
    return list(names) if len(names) == len(kinds) else [f"{name}, {kind}" if kind else name for name, kind in kinds]


def _one_before(row: MeasureRow) -> bool:
    """Whether a measure stood at the same figure before every run that has it."""
    measures = [measure for measure in row.of_runs if measure is not None]
    values = [measure.before.value for measure in measures if measure.before is not None]
    if len(values) < len(measures):
        return not values
    return max(values) - min(values) <= STAYED[measures[0].unit]


def _rows(runs: Sequence[Run]) -> list[MeasureRow]:
    found = []
    for name, (title, _) in TITLES.items():
        of_runs = tuple(run.measured.get(name) if run.measured is not None else None for run in runs)
        if any(measure is not None for measure in of_runs):
            found.append(MeasureRow(name=name, title=title, of_runs=of_runs))
    return found


def _attack_rows(runs: Sequence[Run]) -> list[MeasureRow]:
    of_runs = [
        {attack.name: attack.harm for attack in run.measured.attacks if attack.harm is not None} if run.measured else {}
        for run in runs
    ]
    names = dict.fromkeys(name for own in of_runs for name in own)
    return [MeasureRow(name=name, title=name, of_runs=tuple(own.get(name) for own in of_runs)) for name in names]


def _settings(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    values = [{setting.name: setting.value for setting in run.settings} for run in runs]
    defaults = {setting.name: setting.default for run in runs for setting in run.settings}
    facts = {title: tuple(run.facts.get(title, "?") for run in runs) for run in runs for title in run.facts}
    found = {title: told for title, told in facts.items() if len(set(told)) > 1}
    for name, default in defaults.items():
        told = tuple(own.get(name, default) for own in values)
        if len(set(told)) > 1:
            found[name] = told
    return found


def _prompts(runs: Sequence[Run]) -> list[SharedPrompt]:
    by_run = [{(e.kind, e.prompt): e for e in run.answers.shown} if run.answers is not None else {} for run in runs]
    places = dict.fromkeys(place for own in by_run for place in own)
    found = []
    for place in places:
        own = [exchanges.get(place) for exchanges in by_run]
        there = [exchange for exchange in own if exchange is not None]
        if len(there) < 2:
            continue
        before = {e.before for e in there if e.before is not None}
        found.append(
            SharedPrompt(
                kind=there[0].kind,
                skill=there[0].skill,
                prompt=there[0].prompt,
                before=before.pop() if len(before) == 1 else None,
                after=tuple(None if exchange is None else exchange.after for exchange in own),
            )
        )
    by_kind = [[p for p in found if p.kind == kind][:SHOWN] for kind in ("harmful", "look-alike", "general")]
    return [prompt for own in by_kind for prompt in own]
