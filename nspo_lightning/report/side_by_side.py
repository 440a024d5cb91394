"""Several runs side by side: measures in rows, runs in columns, and what they were told differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nspo_lightning.report.exchanges import SHOWN
from nspo_lightning.report.measurements import TITLES
from nspo_lightning.report.records import Answer, Measure, Run


@dataclass(frozen=True, kw_only=True)
class MeasureRow:
    """A measure of each run; None where it was not taken."""

    name: str
    title: str
    of_runs: tuple[Measure | None, ...]


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """A prompt that more than one run has answered: what the base said, and what each run's policy did."""

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
        same_base: Whether one column "before" holds for all runs.
        rows: Measures.
        settings: Name of a setting -> its value in each run; those that are not the same everywhere.
        prompts: Answered by at least two runs.
    """

    notes: tuple[str, ...]
    same_base: bool
    rows: tuple[MeasureRow, ...]
    settings: dict[str, tuple[str, ...]]
    prompts: tuple[SharedPrompt, ...]


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side."""
    bases = list(dict.fromkeys(run.base or "?" for run in runs))
    notes = []
    if len(bases) > 1:
        notes.append(
            f"These runs have different bases ({', '.join(bases)}): compare how far each has moved from its own, not "
            "the levels, and no answers."
        )
    jobs = {run.name: run.measured.job for run in runs if run.measured is not None}
    if len(set(jobs.values())) > 1:
        said = ", ".join(f"{name}: {job}" for name, job in jobs.items())
        notes.append(f"The figures are of different jobs, which may have other prompts ({said}).")
    notes += [f"{run.name} was not measured: its columns are empty." for run in runs if run.measured is None]
    notes += [f"{run.name} is not finished." for run in runs if not run.finished and not run.measurements]
    same = len(bases) == 1
    return Comparison(
        notes=tuple(notes),
        same_base=same,
        rows=tuple(_rows(runs)),
        settings=_settings(runs),
        prompts=tuple(_prompts(runs)) if same else (),
    )


def _rows(runs: Sequence[Run]) -> list[MeasureRow]:
    found = []
    for name, (title, _) in TITLES.items():
        of_runs = tuple(run.measured.get(name) if run.measured is not None else None for run in runs)
        if any(measure is not None for measure in of_runs):
            found.append(MeasureRow(name=name, title=title, of_runs=of_runs))
    return found


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
        found.append(
            SharedPrompt(
                kind=there[0].kind,
                skill=there[0].skill,
                prompt=there[0].prompt,
                before=next((e.before for e in there if e.before is not None), None),
                after=tuple(None if exchange is None else exchange.after for exchange in own),
            )
        )
    by_kind = [[p for p in found if p.kind == kind][:SHOWN] for kind in ("harmful", "look-alike", "general")]
    return [prompt for own in by_kind for prompt in own]
