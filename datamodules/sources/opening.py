"""Opening a source: where its rows come from, and which preset or columns say how they are read."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nspo_lightning.datamodules.sources import presets_general, presets_safety  # noqa: F401  (registers the presets)
from nspo_lightning.datamodules.sources.convert import Reading, plan_plain
from nspo_lightning.datamodules.sources.errors import DataError, listing
from nspo_lightning.datamodules.sources.files import find_files, looks_local
from nspo_lightning.datamodules.sources.hub import is_saved, read_hub, read_saved
from nspo_lightning.datamodules.sources.presets import Preset, get_preset, preset_of_hub_id, recognise
from nspo_lightning.datamodules.sources.readers import read_file
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.datamodules.sources.source import Kind, PromptSource

BUILTIN_WORLDS = {"toy": "nspo_lightning.toy.world:rows"}
"""Worlds that code generates: a function (part, split) -> rows, imported on first use."""

_BUILTIN_KINDS: dict[str, Kind] = {"harmful": "harmful", "general": "benign"}


def open_source(source: PromptSource, default_kind: Kind, notes: list[str]) -> tuple[Iterator[RawRow], Reading]:
    """Start reading a source and decide, by its first row, how all rows are read.

    Args:
        source: The configured source.
        default_kind: What its rows are unless source or preset says otherwise.
        notes: What a user should know is added here.

    Returns:
        The raw rows, and how they are read.

    Raises:
        DataError: If there is nothing to read, or no way to read it.
    """
    preset = get_preset(source.preset) if source.preset is not None else None
    path = source.path or (preset.hub_id if preset is not None and source.rows is None else None)
    part = ""
    if source.rows is not None:
        raw_rows, skill = _number(source.rows(source.split), source.label), source.label
    elif path is None:
        raise DataError(f"preset {source.preset!r}", "it has no hub id of its own", "Set `path` to the files.")
    elif (world := path.split("/")[0]) in BUILTIN_WORLDS and not Path(path).exists():
        part = path.partition("/")[2] or source.name or ""
        raw_rows, skill = _builtin(world, part, source.split), f"{world}_{part}"
        default_kind = _BUILTIN_KINDS.get(part, default_kind)
    elif looks_local(path):
        _reject_preset_as_path(path)
        if source.name is not None or source.revision is not None:
            notes.append("`name` and `revision` mean nothing for local files and were not used")
        if is_saved(path):
            raw_rows = read_saved(path, source.split)
        else:
            files = find_files(path, source.split)
            raw_rows = itertools.chain.from_iterable(_with_subject(file, preset) for file in files)
        skill = Path(path).name.split(".")[0]
    else:
        preset = (
            preset if preset is not None or source.prompt_column or source.messages_column else preset_of_hub_id(path)
        )
        raw_rows, skill = read_hub(source, preset, path), path.rpartition("/")[2]
    first = next(raw_rows, None)
    if first is None:
        raise DataError(source.label, "it holds no rows", "Fetch or write it again, or choose another split.")
    if preset is None and not part and not (source.prompt_column or source.messages_column):
        preset = recognise(first.data)
        if preset is not None:
            notes.append(f"preset {preset.name} recognised by its columns")
    raw_rows = itertools.chain([first], raw_rows)
    if preset is None:
        return raw_rows, plan_plain(source, first, default_kind, skill)
    recognised = source.preset is None and preset_of_hub_id(path or "") is not preset
    if recognised and preset.shared_layout and source.kind is None and default_kind == "harmful":
        notes.append("taken as harmful, as it stands among safety prompts; set `kind: benign` if it is not")
    parts = (source.name, source.split, Path(path or "").name.split(".")[0])
    return raw_rows, Reading(
        source=source,
        preset=preset,
        default_kind=default_kind,
        default_skill=preset.name,
        recognised=recognised,
        part_kind=next((preset.kind_of_part[part] for part in parts if part in preset.kind_of_part), None),
    )


def _with_subject(file: Path, preset: Preset | None) -> Iterator[RawRow]:
    # A headerless file (MMLU) keeps its subject in its name.
    header = (
        preset.csv_header if preset is not None and file.name.lower().removesuffix(".gz").endswith(".csv") else None
    )
    for row in read_file(file, header):
        if header is not None:
            subject = file.stem.rpartition("_")[0] or file.stem
            yield RawRow(where=row.where, data={**row.data, "subject": subject})
        else:
            yield row


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
        raise DataError(
            f"built-in world {world!r}",
            f"it has no part {part!r}",
            f"Use {listing([f'{world}/{p}' for p in _BUILTIN_KINDS])}.",
        )
    module_name, _, function = BUILTIN_WORLDS[world].partition(":")
    rows = getattr(importlib.import_module(module_name), function)(part, split)
    return _number(rows, f"{world}/{part} ({split})")


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


def is_builtin(source: PromptSource) -> bool:
    """Whether a source is a built-in world, which comes with its own validation and test splits.

    Args:
        source: The configured source.

    Returns:
        True for paths such as `toy/harmful`.
    """
    return source.path is not None and source.path.split("/")[0] in BUILTIN_WORLDS and not Path(source.path).exists()
