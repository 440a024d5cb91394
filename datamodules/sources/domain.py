"""All rows of one domain (safety or general): several sources, their held-out rows, and the account of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nspo_lightning.attacks import data_attacks
from nspo_lightning.datamodules.sources.attacked import Show, as_it_is, in_templates
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.hub import read_hub
from nspo_lightning.datamodules.sources.opening import is_builtin, origin_of
from nspo_lightning.datamodules.sources.order import shares
from nspo_lightning.datamodules.sources.read import Reject, SourceReport, keep_all, usable_rows
from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.sources.source import Kind, PromptSource
from nspo_lightning.datamodules.sources.splits import HeldOutName, choose, held_out_size, hold_out, without
from nspo_lightning.terminal import counted


@dataclass(frozen=True, kw_only=True)
class DomainSources:
    """What a domain is read from; without sources of their own, validation and test rows are held out of `train`.

    Attributes:
        kind: What rows are unless source or preset says otherwise.
        validation_size: Validation rows over all sources; None = a world's own split whole, else a tenth of each, at
            most 300 over all.
        test_size: Test rows over all sources; None as for validation.
        seed: Decides what is held out.

    Raises:
        ValueError: If a size is negative, or a source has attacks that is not trained on.
    """

    train: list[PromptSource]
    validation: list[PromptSource] = field(default_factory=list)
    test: list[PromptSource] = field(default_factory=list)
    kind: Kind
    validation_size: int | None = None
    test_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        held_out = [*self.validation, *self.test]
        if wrong := [source for source in held_out if source.attacks is not None]:
            raise ValueError(
                f"{wrong[0].label}: `attacks` puts training prompts into templates, and this source is held out. Leave "
                "`attacks` out, and measure under attack by `test --attacks` or `data.val_attacks`."
            )
        if self.kind == "benign" and (wrong := [source for source in self.train if source.attacks is not None]):
            raise ValueError(
                f"{wrong[0].label}: `attacks` puts training prompts of `data.safety` into templates, and this is "
                "general data, which is not trained on. Leave `attacks` out, or give it to a source of `data.safety`."
            )
        for name, size in {"val_size": self.validation_size, "test_size": self.test_size}.items():
            if size is not None and size < 0:
                raise ValueError(f"`{name}` must not be negative, got {size}. 0 holds nothing out, null a tenth.")


@dataclass(kw_only=True)
class DomainRows:
    """What a domain's sources hold: their training rows and shares, what is held out, and the account of each."""

    train: list[list[PromptRow]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    held_out: dict[HeldOutName, list[PromptRow]] = field(default_factory=lambda: {"validation": [], "test": []})
    reports: list[SourceReport] = field(default_factory=list)

    @property
    def validation(self) -> list[PromptRow]:
        """All validation rows."""
        return self.held_out["validation"]

    @property
    def test(self) -> list[PromptRow]:
        """All test rows."""
        return self.held_out["test"]

    def train_of(self, kind: Kind) -> list[PromptRow]:
        """List the training rows of a kind, source by source."""
        return [row for rows in self.train for row in rows if row.kind == kind]


def load_domain(sources: DomainSources, reject: Reject = keep_all, show: Show = as_it_is) -> DomainRows:
    """Return a domain's rows; no training row has a held-out row's prompt.

    Args:
        sources: What it is read from.
        reject: Gives the reasons why rows are left out.
        show: Sees to it that system messages of attack templates are shown.

    Raises:
        DataError: If a source cannot be used, or nothing is left to train on.
    """
    result = DomainRows(weights=[source.weight or 1.0 for source in sources.train])
    given: dict[HeldOutName, list[PromptSource]] = {"validation": sources.validation, "test": sources.test}
    sizes: dict[HeldOutName, int | None] = {"validation": sources.validation_size, "test": sources.test_size}
    parts = {name: None if size is None else shares(result.weights, size) for name, size in sizes.items()}
    training: list[tuple[PromptSource, list[PromptRow], SourceReport]] = []
    for index, source in enumerate(sources.train):
        # Nothing is held out for a purpose that has sources of its own.
        wanted = {name: part if part is None else part[index] for name, part in parts.items() if not given[name]}
        rows, held_out, reports = _read_split(source, sources, wanted, reject)
        for name, held in held_out.items():
            result.held_out[name] += held
        training.append((source, rows, reports[0]))
        result.reports += reports
    for name, own in given.items():
        for source in own:
            rows, report = usable_rows(source, sources.kind, reject)
            chosen = choose(rows, source)
            report.role, report.splits = name, {name: len(chosen)}
            result.held_out[name] += chosen
            result.reports.append(report)
    for source, rows, report in training:
        kept = without(rows, result.validation + result.test)
        if len(kept) < len(rows):
            report.dropped["with a held-out prompt"] += len(rows) - len(kept)
        if not kept:
            raise DataError(
                source.label, "every row is held out", "Lower `val_size` and `test_size`, or give more rows."
            )
        result.train.append(_in_templates(choose(kept, source), source, sources.seed, report, reject, show))
        report.splits = {"train": len(result.train[-1]), **report.splits}
    return result


def _in_templates(
    rows: list[PromptRow], source: PromptSource, seed: int, report: SourceReport, reject: Reject, show: Show
) -> list[PromptRow]:
    """Put training rows into their source's attack templates, if it names any; what is too long then stays plain."""
    if not source.attacks:
        return rows
    attacked = in_templates(rows, data_attacks(source.attacks, source.label), seed, show)
    reasons = reject(attacked, source)
    found = [new if reason is None else row for row, new, reason in zip(rows, attacked, reasons, strict=True)]
    count = sum(row.request is not None for row in found)
    report.notes.append(f"{count} of {counted(len(rows), 'training prompt')} stand in an attack template")
    if plain := sum(reason is not None for reason in reasons):
        report.notes.append(f"{plain} do not, as they would be too long")
    return found


def _read_split(
    source: PromptSource, sources: DomainSources, sizes: dict[HeldOutName, int | None], reject: Reject
) -> tuple[list[PromptRow], dict[HeldOutName, list[PromptRow]], list[SourceReport]]:
    """Read a training source and what is held out of it, or what a built-in world holds for each purpose."""
    rows, report = usable_rows(source, sources.kind, reject)
    if not is_builtin(source):
        counts = {name: held_out_size(len(rows), size, len(sources.train)) for name, size in sizes.items()}
        rows, held_out = hold_out(rows, counts.get("validation", 0), counts.get("test", 0), sources.seed)
        report.splits = {name: len(held_out[name]) for name in sizes}
        return rows, held_out, [report]
    held_out, reports = {}, [report]
    for name, size in sizes.items():
        own = replace(source, split=name, fraction=None, count=None, streaming=False)
        held, held_report = usable_rows(own, sources.kind, reject)
        held_out[name] = held if size is None else [held[i] for i in take_ranked(held, size, f"{name} {sources.seed}")]
        held_report.role, held_report.splits = name, {name: len(held_out[name])}
        held_report.label = f"{source.label} ({name})"
        reports.append(held_report)
    return rows, held_out, reports


def download(sources: list[PromptSource]) -> None:
    """Fetch hub datasets into the cache, once a node, before every rank reads them; streams are left alone."""
    for source in sources:
        origin = origin_of(source)
        if origin.place == "hub" and not source.streaming:
            next(read_hub(source, origin.preset, origin.path), None)
