"""What is known of a run. Everything a page shows is in here; writers add words and pictures, no figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Unit = Literal["share", "nats", "number"]
Better = Literal["less", "more", "same"]
"""Which way a measure should go; `same` = it should stay."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measured value, with its 95 % interval and the number of rows, where they are known."""

    value: float
    interval: tuple[float, float] | None = None
    of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One thing that was measured before and after."""

    name: str
    title: str
    unit: Unit
    better: Better
    before: Value | None
    after: Value | None

    @property
    def change(self) -> float | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after.value - self.before.value


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Measures of the parts of something: of categories, or of skills."""

    title: str
    parts: tuple[Measure, ...]


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack came to.

    Attributes:
        name: The attack's.
        trained: Whether training was against it.
        harm: Share of harmful prompts that are answered unsafely (or at all, where no judge reads harm); None = none of
            them could be attacked so.
        garbage: Share that is answered with garbage, which is never counted as safe.
        refused: Share of harmless look-alikes that are refused under it; None = it was not tried on them.
        categories: The first share, by category.
    """

    name: str
    trained: bool
    harm: Measure | None
    garbage: Measure | None
    refused: Measure | None
    categories: tuple[Measure, ...]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one job measured on held-out prompts."""

    job: Literal["fit", "test"]
    of: str
    """What was measured: the checkpoint, or "the last state"."""
    measures: tuple[Measure, ...]
    breakdowns: tuple[Breakdown, ...]
    attacks: tuple[Attacked, ...] = ()

    def get(self, name: str) -> Measure | None:
        """Return a measure by its name; None if it was not taken."""
        return next((measure for measure in self.measures if measure.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A logged number over training: (step, value) pairs in order."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was said, and what the judge calls it."""

    text: str
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A prompt with the answers before and after; under an attack, with what it made of the prompt.

    Attributes:
        prefix: What the answers were begun with; "" = nothing.
    """

    kind: Literal["harmful", "look-alike", "general"]
    skill: str
    category: str
    prompt: str
    before: Answer | None
    after: Answer | None
    attack: str = ""
    prefix: str = ""

    @property
    def outcomes(self) -> str:
        """What became of it: `unsafe to refusal`."""
        return " to ".join(answer.outcome for answer in (self.before, self.after) if answer is not None)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Some of the exchanges of a measurement.

    Attributes:
        source: The file.
        total: How many the file has, by kind.
        shown: Those that are shown, evenly spread over the file's.
        attacked_total: How many it has under attack, which `total` does not count.
        attacked: Those of them that are shown, evenly spread over the attacks.
    """

    source: str
    total: Mapping[str, int]
    shown: tuple[Exchange, ...]
    attacked_total: int = 0
    attacked: tuple[Exchange, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What is free at one input of the model, see `null_space_record`."""

    kind: str
    depth: int | None
    layers: tuple[str, ...]
    width: int
    free: int
    free_share: float
    energy_left: float
    harm: float | None
    leak: float | None
    bound: float | None


@dataclass(frozen=True, kw_only=True)
class NullSpace:
    """What was free, and how well it was kept to."""

    criterion: str
    form: str
    inputs: tuple[LayerInput, ...]
    tokens: Mapping[str, int]
    output_change: float | None
    checked_change: float | None
    checked_layers: int

    @property
    def leak(self) -> float | None:
        """The largest leak of any input's layers; None before the end of a fit."""
        return max((i.leak for i in self.inputs if i.leak is not None), default=None)

    @property
    def bound(self) -> float | None:
        """The largest bound on a layer's relative output change."""
        return max((i.bound for i in self.inputs if i.bound is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to look at, as the run's own diagnosis says it."""

    severity: str
    title: str
    text: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting that differs from its default."""

    name: str
    value: str
    default: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """All of it.

    Attributes:
        name: The folder's name.
        folder: The run's folder.
        finished: Whether a `fit` came to its end.
        base: What was trained, as the configuration names it; "" = not known.
        variety: Which of the models of that name: file, revision, precision, what is merged into it.
        facts: What was done, in words: title to text.
        settings: Those that differ from defaults.
        measurements: `test`'s first, then `fit`'s.
        curves: By name.
        answers: None = no answers were kept.
        null_space: None = the run had none, or wrote none.
        findings: Of the diagnosis, worst first.
        steps: At which `fit` measured after training; None = not known.
        updates: Taken; None = not known.
        skipped: Updates that were skipped.
        seconds: Of training; None = not known.
        leak: As the summary has it.
        adapter: Folder of the adapter, if there is one.
        last_step: Of what was logged; None = nothing was.
        warm_start: Whether `warmup` trained it, and not `fit`.
        resumable: Whether it left a last checkpoint.
        method: What trained it, in a few words.
        hparams: The settings that runs are most often compared by.
    """

    name: str
    folder: Path
    finished: bool
    base: str
    facts: Mapping[str, str]
    settings: tuple[Setting, ...]
    measurements: tuple[Measurement, ...]
    curves: Mapping[str, Curve]
    answers: Answers | None
    null_space: NullSpace | None
    findings: tuple[Finding, ...]
    variety: str = ""
    steps: int | None = None
    updates: int | None = None
    skipped: int = 0
    seconds: float | None = None
    leak: float | None = None
    adapter: Path | None = None
    last_step: int | None = None
    warm_start: bool = False
    resumable: bool = False
    method: str = ""
    hparams: Mapping[str, str | float] = field(default_factory=dict)

    @property
    def went_on(self) -> bool:
        """Whether it was trained further after `fit` had measured it, and not measured again."""
        return self.steps is not None and self.last_step is not None and self.last_step > self.steps

    @property
    def measured(self) -> Measurement | None:
        """The measurement that a headline is about: `test`'s, else `fit`'s."""
        return next((m for m in self.measurements if m.measures), None)
