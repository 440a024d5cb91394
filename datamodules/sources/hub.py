"""Hugging Face datasets, with their many ways to fail turned into one message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nspo_lightning.compat.datasets import SAVED_INDICES, opens_files, saved_parts
from nspo_lightning.datamodules.sources.data_error import DataError, clip, listing
from nspo_lightning.datamodules.sources.files import check_inside
from nspo_lightning.datamodules.sources.presets import Preset
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.datamodules.sources.source import PromptSource


def hub_arguments(source: PromptSource, preset: Preset | None, hub_id: str) -> dict[str, Any]:
    """Collect what `load_dataset` is called with; the preset gives configuration, revision and names of splits."""
    name = source.name or (preset.hub_name if preset else None)
    split = source.split
    if preset is not None and source.name not in preset.kind_of_part:  # another part has splits of its own
        split = preset.hub_splits.get(split, split)
    revision = source.revision or (preset.hub_revision if preset else None)
    arguments = {"path": hub_id, "name": name, "split": split, "revision": revision, "streaming": source.streaming}
    if preset is not None and preset.hub_data_dirs:
        arguments.update(name=None, data_dir=name)
    return arguments


def read_hub(source: PromptSource, preset: Preset | None, hub_id: str) -> Iterator[RawRow]:
    """Yield the rows of a hub dataset.

    Raises:
        DataError: If it cannot be had: no network, no such dataset, configuration or split, no access.
    """
    import datasets

    arguments = hub_arguments(source, preset, hub_id)
    try:
        data = _without_media(datasets.load_dataset(**arguments))
        if source.streaming:
            data = data.shuffle(seed=source.seed, buffer_size=max(1000, source.count or 0))
        for number, row in enumerate(data, start=1):
            yield RawRow(where=f"{hub_id} ({arguments['split']}), row {number}", data=row)
    except Exception as error:  # datasets raises dozens of types; each must end in one message
        raise DataError(
            f"hub dataset {hub_id}", f"{type(error).__name__}: {clip(str(error), 240)}", _cure(error)
        ) from error


def is_saved(path: str) -> bool:
    """Whether a folder holds the files that mark one written by `save_to_disk`."""
    return any((Path(path).expanduser() / mark).is_file() for mark in SAVED_INDICES)


def read_saved(path: str, split: str) -> Iterator[RawRow]:
    """Yield the rows of a folder that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: If it cannot be read, or has no such split.
    """
    import datasets

    folder = Path(path).expanduser()
    _check_saved(folder)
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises dozens of types; each must end in one message
        found = f"{type(error).__name__}: {clip(str(error), 240)}"
        raise DataError(path, found, "Write the folder again with `save_to_disk`.") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(
                path, f"no split {split!r}; there are {listing(list(data))}", "Set `split` to one of these."
            )
        data = data[split]
    for number, row in enumerate(_without_media(data).with_format(None), start=1):
        yield RawRow(where=f"{path} ({split}), row {number}", data=row)


def _check_saved(folder: Path) -> None:
    """Check that the links and the indices of a saved dataset lead nowhere else."""
    inside = folder.resolve()
    for file in sorted(folder.rglob("*")):
        check_inside(file, inside)
        if file.name not in SAVED_INDICES:
            continue
        try:
            targets = saved_parts(file)
        except (ValueError, KeyError, TypeError) as error:
            found = f"not the index of a saved dataset ({type(error).__name__}: {clip(str(error), 80)})"
            raise DataError(str(file), found, "Write the folder again with `save_to_disk`.") from error
        for target in targets:
            check_inside(target, inside)


def _without_media(data: Any) -> Any:
    """Drop columns of images, sounds and other files: decoding them opens whatever path stands in a row."""
    media = [name for name, feature in (data.features or {}).items() if opens_files(feature)]
    return data.remove_columns(media) if media else data


def _cure(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    offline = any(
        os.environ.get(key, "").upper() in ("1", "TRUE", "ON", "YES")
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    if "gated" in text or "401" in text or "403" in text:
        return "Ask for access on the dataset's page and log in with `hf auth login`, or point `path` at a local copy."
    if "unknown split" in text or "bad split" in text:
        return "Set `split` to one that the message lists."
    if "config" in text and ("missing" in text or "not found" in text):
        return "Set `name` to one of the configurations that the message lists."
    if "scripts are no longer supported" in text:
        return "Set `revision: refs/convert/parquet`, or point `path` at a local copy."
    if offline:
        return "Offline mode is set in the environment: unset it, or point `path` at a local file."
    return "Check the id and the network; without one, download the files elsewhere and point `path` at them."
