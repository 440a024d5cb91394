"""All rows of one domain (safety or general): several sources, their held-out rows, and the account of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nspo_lightning.datamodules.sources.errors import DataError
from nspo_lightning.datamodules.sources.files import looks_local
from nspo_lightning.datamodules.sources.hub import read_hub
from nspo_lightning.datamodules.sources.opening import is_builtin
from nspo_lightning.datamodules.sources.order import shares
from nspo_lightning.datamodules.sources.presets import get_preset, preset_of_hub_id
from nspo_lightning.datamodules.sources.read import Reject, SourceReport, read_source
from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.sources.source import Kind, PromptSource
from nspo_lightning.datamodules.sources.splits import Split, choose, held_out_size, hold_out, without


@dataclass(frozen=True, kw_only=True)
class DomainSources:
    """What a domain is read from.

    Attributes:
        train: Sources of training or calibration rows.
        validation: Sources of validation rows; empty = held out of `train`.
        test: Sources of test rows; empty = held out of `train`.
        kind: What rows are unless source or preset says otherwise.
        validation_size: Validation rows over all sources; None = a world's own split whole, else a tenth.
        test_size: Likewise for test rows.
        seed: Decides what is held out.

    Raises:
        ValueError: If a size is negative.
    """

    train: list[PromptSource]
    validation: list[PromptSource]
    test: list[PromptSource]
    kind: Kind
    validation_size: int | None = None
    test_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, size in {"val_size": self.validation_size, "test_size": self.test_size}.items():
            if size is not None and size < 0:
                raise ValueError(f"`{name}` must not be negative, got {size}. 0 holds nothing out, null a tenth.")


@dataclass(kw_only=True)
class DomainRows:
    """What a domain's sources hold.

    Attributes:
        train: The training rows of each source.
        weights: The sources' shares.
        validation: All validation rows.
        test: All test rows.
        reports: The account of each source.
    """

    train: list[list[PromptRow]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    validation: list[PromptRow] = field(default_factory=list)
    test: list[PromptRow] = field(default_factory=list)
    reports: list[SourceReport] = field(default_factory=list)


def load_domain(sources: DomainSources, reject: Reject) -> DomainRows:
    """Read a domain.

    Args:
        sources: What to read.
        reject: Gives the reasons why rows are left out.

    Returns:
        Its rows. No training row has a held-out row's prompt.

    Raises:
        DataError: If a source cannot be used, or nothing is left to train on.
    """
    result = DomainRows(weights=[source.weight or 1.0 for source in sources.train])
    wanted = [
        None if size is None else shares(result.weights, size) for size in (sources.validation_size, sources.test_size)
    ]
    splits: list[Split] = []
    for index, source in enumerate(sources.train):
        validation_size, test_size = (None if sizes is None else sizes[index] for sizes in wanted)
        split, reports = _read_split(source, sources, validation_size, test_size, reject)
        splits.append(split)
        result.reports += reports
    result.validation = [row for split in splits for row in split.validation]
    result.test = [row for split in splits for row in split.test]
    for given, name in ((sources.validation, "validation"), (sources.test, "test")):
        if given:
            setattr(result, name, _read_given(given, sources, name, reject, result.reports))
    keys = {row.key for row in (*result.validation, *result.test)}
    for source, split, report in zip(sources.train, splits, _train_reports(result.reports), strict=True):
        rows = without(split.train, keys)
        if len(rows) < len(split.train):
            report.dropped["with a held-out prompt"] += len(split.train) - len(rows)
        if not rows:
            raise DataError(
                source.label, "every row is held out", "Lower `val_size` and `test_size`, or give more rows."
            )
        result.train.append(choose(rows, source))
        report.splits = {"train": len(result.train[-1]), **report.splits}
    return result


def _train_reports(reports: list[SourceReport]) -> list[SourceReport]:
    return [report for report in reports if report.role == "train"]


def _read_split(
    source: PromptSource, sources: DomainSources, validation_size: int | None, test_size: int | None, reject: Reject
) -> tuple[Split, list[SourceReport]]:
    rows, report = read_source(source, sources.kind, reject)
    wanted = {
        name: size
        for name, size, given in (
            ("validation", validation_size, sources.validation),
            ("test", test_size, sources.test),
        )
        if not given  # nothing is held out for a purpose that has sources of its own
    }
    if not is_builtin(source):
        sizes = {name: held_out_size(len(rows), size) for name, size in wanted.items()}
        split = hold_out(rows, sizes.get("validation", 0), sizes.get("test", 0), sources.seed)
        report.splits = {name: len(getattr(split, name)) for name in wanted}
        return split, [report]
    split, reports = Split(train=rows, validation=[], test=[]), [report]
    for name, size in wanted.items():
        own = replace(source, split=name, fraction=None, count=None, streaming=False)
        held, held_report = read_source(own, sources.kind, reject)
        held = held if size is None else [held[i] for i in take_ranked(held, size, f"{name} {sources.seed}")]
        setattr(split, name, held)
        held_report.role, held_report.splits = name, {name: len(held)}
        held_report.label = f"{source.label} ({name})"
        reports.append(held_report)
    return split, reports


def _read_given(
    given: list[PromptSource], sources: DomainSources, role: str, reject: Reject, reports: list[SourceReport]
) -> list[PromptRow]:
    result: list[PromptRow] = []
    for source in given:
        rows, report = read_source(source, sources.kind, reject)
        chosen = choose(rows, source)
        report.role, report.splits = role, {role: len(chosen)}
        reports.append(report)
        result += chosen
    return result


def download(sources: list[PromptSource]) -> None:
    """Fetch hub datasets into the cache, once a node, before every rank reads them.

    Args:
        sources: Any sources; local ones are left alone.
    """
    for source in sources:
        preset = get_preset(source.preset) if source.preset is not None else None
        path = source.path or (preset.hub_id if preset is not None else None)
        if path is None or source.rows is not None or source.streaming or is_builtin(source) or looks_local(path):
            continue
        next(read_hub(source, preset or preset_of_hub_id(path), path), None)
