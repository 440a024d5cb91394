"""The presets that configurations may name: looked up by name, by hub id, or by the columns of a row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nspo_lightning.datamodules.sources.data_error import DataError, listing
from nspo_lightning.datamodules.sources.presets import Preset, Row
from nspo_lightning.datamodules.sources.presets_general import GENERAL_PRESETS
from nspo_lightning.datamodules.sources.presets_safety import SAFETY_PRESETS

_PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*GENERAL_PRESETS, *SAFETY_PRESETS)}


def register(preset: Preset) -> Preset:
    """Return a preset after adding it to those that configurations may name.

    Raises:
        ValueError: If the name is taken.
    """
    if preset.name in _PRESETS:
        raise ValueError(f"A preset named {preset.name!r} is already registered. Choose another name.")
    _PRESETS[preset.name] = preset
    return preset


def preset_names() -> list[str]:
    """List the names of the registered presets, in the order of registration."""
    return list(_PRESETS)


def get_preset(name: str) -> Preset:
    """Return the preset that a configuration names; case and `-` do not matter.

    Raises:
        DataError: If there is none of that name.
    """
    key = name.lower().replace("-", "_")
    if key not in _PRESETS:
        close = difflib.get_close_matches(key, _PRESETS, n=3)
        cure = f"Did you mean {listing(close)}?" if close else f"Known presets: {', '.join(_PRESETS)}."
        raise DataError(f"preset {name!r}", "no preset has this name", cure)
    return _PRESETS[key]


def preset_of_hub_id(hub_id: str) -> Preset | None:
    """Find the preset that belongs to a hub dataset."""
    return next((p for p in _PRESETS.values() if p.hub_id is not None and p.hub_id.lower() == hub_id.lower()), None)


def recognise(row: Row) -> Preset | None:
    """Return the preset whose columns the first row of a file has; None when no form fits or two fit equally well.

    The form with the most columns wins: the 16 columns of PKU-SafeRLHF also hold its older 7.
    """
    sizes = {
        name: max(len(names) for names in preset.requires if all(column in row for column in names))
        for name, preset in _PRESETS.items()
        if preset.fits(row) and (preset.recognise is None or preset.recognise(row))
    }
    winners = [name for name, size in sizes.items() if size == max(sizes.values())]
    return _PRESETS[winners[0]] if len(winners) == 1 else None


def nearest(columns: Iterable[str]) -> list[str]:
    """Name up to three presets that share the most columns with a file, with the columns that they need."""
    have = set(columns)
    forms = [
        (len(have & set(names)) / len(names), preset.name, names)
        for preset in _PRESETS.values()
        for names in preset.requires
    ]
    return [
        f"{name} ({', '.join(names)})" for share, name, names in sorted(forms, key=lambda f: -f[0])[:3] if share > 0
    ]
