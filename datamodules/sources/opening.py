"""Opening a source: where its rows come from, and which preset or columns say how they are read."""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nspo_lightning.datamodules.sources.convert import RowPlan
from nspo_lightning.datamodules.sources.data_error import DataError, listing
from nspo_lightning.datamodules.sources.files import find_files, looks_local
from nspo_lightning.datamodules.sources.hub import is_saved, read_hub, read_saved
from nspo_lightning.datamodules.sources.presets import Preset
from nspo_lightning.datamodules.sources.readers import read_file
from nspo_lightning.datamodules.sources.registry import get_preset, nearest, preset_of_hub_id, recognise
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource

BUILTIN_WORLDS = {"toy": "nspo_lightning.toy.world:rows"}
"""Worlds that code generates: a function (part, split) -> rows, imported on first use."""

_BUILTIN_KINDS: dict[str, Kind] = {"harmful": "harmful", "general": "benign"}
_CHAT_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a source's rows come from, and the preset that the source or its hub id names."""

    place: Literal["function", "world", "local", "hub"]
    path: str = ""
    part: str = ""
    preset: Preset | None = None


def origin_of(source: PromptSource) -> Origin:
    """Return where a source's rows come from, without reading any.

    Raises:
        DataError: If its preset is unknown, or belongs to no hub dataset and no path is given.
    """
    preset = get_preset(source.preset) if source.preset is not None else None
    if source.rows is not None:
        return Origin(place="function", preset=preset)
    path = source.path or (preset.hub_id if preset is not None else None)
    if path is None:
        raise DataError(f"preset {source.preset!r}", "it has no hub id of its own", "Set `path` to the files.")
    if is_builtin(source):
        return Origin(place="world", path=path, part=path.partition("/")[2] or source.name or "", preset=preset)
    if looks_local(path):
        return Origin(place="local", path=path, preset=preset)
    if preset is None and not (source.prompt_column or source.messages_column):
        preset = preset_of_hub_id(path)
    return Origin(place="hub", path=path, preset=preset)


def is_builtin(source: PromptSource) -> bool:
    """Whether a source is a built-in world such as `toy/harmful`, which has validation and test splits of its own."""
    return source.path is not None and source.path.split("/")[0] in BUILTIN_WORLDS and not Path(source.path).exists()


def open_source(source: PromptSource, default_kind: Kind, notes: list[str]) -> tuple[Iterator[RawRow], RowPlan]:
    """Return a source's raw rows, and how they are read, which its first row decides.

    Args:
        source: The configured source.
        default_kind: What its rows are unless source or preset says otherwise.
        notes: What a user should know is added here.

    Raises:
        DataError: If there is nothing to read, or no way to read it.
    """
    origin = origin_of(source)
    raw_rows, skill = _start(source, origin, notes)
    first = next(raw_rows, None)
    if first is None:
        raise DataError(source.label, "it holds no rows", "Fetch or write it again, or choose another split.")
    raw_rows = itertools.chain([first], raw_rows)
    preset, default_kind = origin.preset, _BUILTIN_KINDS.get(origin.part, default_kind)
    plain = origin.place == "world" or source.prompt_column or source.messages_column
    if preset is None and not plain and (preset := recognise(first.data)) is not None:
        notes.append(f"preset {preset.name} recognised by its columns")
    if preset is None:
        return raw_rows, _plain_plan(source, first, default_kind, skill)
    return raw_rows, _preset_plan(source, origin, preset, default_kind, notes)


def _start(source: PromptSource, origin: Origin, notes: list[str]) -> tuple[Iterator[RawRow], str]:
    """Start reading; also give the skill of rows that name none."""
    name = Path(origin.path).name
    match origin.place:
        case "function":
            assert source.rows is not None
            return _number(source.rows(source.split), source.label), source.label
        case "world":
            world = origin.path.split("/")[0]
            return _builtin(world, origin.part, source.split), f"{world}_{origin.part}"
        case "local":
            return _local(source, origin, notes), name.split(".")[0]
        case "hub":
            return read_hub(source, origin.preset, origin.path), name


def _number(rows: Iterable[dict[str, Any]], label: str) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        where = f"{label}, row {number}"
        if not isinstance(row, dict):
            raise DataError(
                where, f"a row must be a dict, got {type(row).__name__}", "Let the function return a list of dicts."
            )
        yield RawRow(where=where, data=row)


def _builtin(world: str, part: str, split: str) -> Iterator[RawRow]:
    if part not in _BUILTIN_KINDS:
        parts = listing([f"{world}/{known}" for known in _BUILTIN_KINDS])
        raise DataError(f"built-in world {world!r}", f"it has no part {part!r}", f"Use {parts}.")
    return _number(pkgutil.resolve_name(BUILTIN_WORLDS[world])(part, split), f"{world}/{part} ({split})")


def _local(source: PromptSource, origin: Origin, notes: list[str]) -> Iterator[RawRow]:
    _reject_preset_as_path(origin.path)
    if source.name is not None or source.revision is not None:
        notes.append("`name` and `revision` mean nothing for local files and were not used")
    if is_saved(origin.path):
        return read_saved(origin.path, source.split)
    files = find_files(origin.path, source.split)
    return itertools.chain.from_iterable(_with_subject(file, origin.preset, notes) for file in files)


def _reject_preset_as_path(path: str) -> None:
    if Path(path).expanduser().exists():
        return
    try:
        preset = get_preset(path)
    except DataError:
        return
    raise DataError(
        path,
        "this is the name of a preset, not of a file",
        f"Write `preset: {preset.name}` (reads {preset.hub_id} from the hub), with `path` for a local copy.",
    )


def _with_subject(file: Path, preset: Preset | None, notes: list[str]) -> Iterator[RawRow]:
    # A headerless file (MMLU) keeps its subject in its name.
    is_csv = file.name.lower().removesuffix(".gz").endswith(".csv")
    if preset is None or preset.csv_header is None or not is_csv:
        yield from read_file(file, notes=notes)
        return
    subject = file.stem.rpartition("_")[0] or file.stem
    for row in read_file(file, preset.csv_header):
        yield RawRow(where=row.where, data={**row.data, "subject": subject})


def _preset_plan(source: PromptSource, origin: Origin, preset: Preset, default_kind: Kind, notes: list[str]) -> RowPlan:
    recognised = source.preset is None and preset_of_hub_id(origin.path) is not preset
    if recognised and preset.shared_layout and source.kind is None and default_kind == "harmful":
        notes.append("taken as harmful, as it stands among safety prompts; set `kind: benign` if it is not")
    parts = (source.name, source.split, Path(origin.path).name.split(".")[0])
    return RowPlan(
        source=source,
        preset=preset,
        default_kind=default_kind,
        default_skill=preset.name,
        recognised=recognised,
        part_kind=next((preset.kind_of_part[part] for part in parts if part in preset.kind_of_part), None),
    )


def _plain_plan(source: PromptSource, row: RawRow, default_kind: Kind, default_skill: str) -> RowPlan:
    """Choose the columns of a source without a preset by its first row."""
    columns = row.data
    messages = source.messages_column
    prompt = source.prompt_column or (None if messages else "prompt" if "prompt" in columns else None)
    if prompt is None and messages is None:
        messages = next((name for name in _CHAT_COLUMNS if name in columns), None)
    if prompt is None and messages is None:
        close = nearest(columns)
        hint = f" Presets with similar columns: {'; '.join(close)}." if close else ""
        raise DataError(
            row.where,
            f"no preset fits the columns {listing(list(columns))}, and there is no column `prompt` or `messages`",
            f"Name the prompt's column (`prompt_column: ...`) or a `preset`.{hint}",
        )
    for field, name in source.named_columns.items():
        if name not in columns:
            raise DataError(
                row.where,
                f"there is no column {name!r}; the columns are {listing(list(columns))}",
                f"Set `{field}` to one of them.",
            )
    answer = source.answer_column or "answer"  # which later rows may have
    return RowPlan(
        source=source,
        prompt_column=prompt,
        messages_column=messages,
        answer_column=answer,
        default_kind=default_kind,
        default_skill=default_skill,
    )
