"""Presets: how the rows of a public dataset become prompts.

Adding one is one entry, ``register(Preset(name=..., kind=..., requires=(("a", "b"),), prompt="a", ...))``; an optional
hub id lets a configuration name the preset alone. A preset is recognised by its columns, so that a path is enough.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nspo_lightning.datamodules.sources.errors import DataError, listing
from nspo_lightning.datamodules.sources.rows import Prompt
from nspo_lightning.datamodules.sources.source import Kind

Row = dict[str, Any]
TextField = str | Callable[[Row], str]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How to read one public dataset.

    Attributes:
        name: The name that a configuration uses.
        kind: Whether a good policy refuses or answers; a function where rows differ.
        kind_of_part: Another kind for a named split, configuration or file of the dataset.
        requires: Sets of columns by which a row is recognised; any one of them is enough.
        prompt: The prompt's column, or a function of the row.
        answer: The reference answer's column, or a function of the row; None where there is none.
        final_answer: The short answer that a scorer compares with, where it differs from the reference answer.
        skill: The name under which results are reported, or a function of the row; the preset's name when None.
        keep: Columns that go along with the row (those that it has).
        skip: Gives the reason why a row is left out, or None.
        recognise: A further condition on a row for being recognised by its columns.
        id_column: A column whose values must differ; repeated ones are an error.
        hub_id: The dataset on the Hugging Face hub.
        hub_name: Its configuration.
        hub_revision: Its revision, where it must be another than the newest.
        hub_data_dirs: Whether `name` means a folder of the dataset instead of a configuration.
        hub_splits: What the hub calls `train`, `validation` and `test`, where the names differ.
        shared_layout: Whether other datasets use the same columns for other purposes: recognised by its columns alone,
            such a file is taken for what its place in the configuration says (harmful among safety prompts).
        csv_header: The column names of a csv file without a header line.
        note: What a user should know: gated access, licence, quirks.
    """

    name: str
    kind: Kind | Callable[[Row], Kind]
    requires: tuple[tuple[str, ...], ...]
    prompt: str | Callable[[Row], Prompt]
    kind_of_part: dict[str, Kind] = field(default_factory=dict)
    answer: TextField | None = None
    final_answer: TextField | None = None
    skill: TextField | None = None
    keep: tuple[str, ...] = ()
    skip: Callable[[Row], str | None] | None = None
    recognise: Callable[[Row], bool] | None = None
    id_column: str | None = None
    hub_id: str | None = None
    hub_name: str | None = None
    hub_revision: str | None = None
    hub_data_dirs: bool = False
    hub_splits: dict[str, str] = field(default_factory=dict)
    shared_layout: bool = False
    csv_header: tuple[str, ...] | None = None
    note: str = ""

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns of one of the known forms.

        Args:
            row: The row's columns.

        Returns:
            True when the preset can read it.
        """
        return any(all(name in row for name in names) for names in self.requires)


_PRESETS: dict[str, Preset] = {}


def text_of(row: Row, column: str) -> str:
    """Get text from a row, for prompts that are put together from several columns.

    Args:
        row: The row's columns.
        column: The column.

    Returns:
        The text.

    Raises:
        ValueError: If the column holds something else.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {'null' if value is None else type(value).__name__}, not text")
    return value


def register(preset: Preset) -> Preset:
    """Add a preset to those that configurations may name.

    Args:
        preset: The entry.

    Returns:
        The same entry.

    Raises:
        ValueError: If the name is taken.
    """
    if preset.name in _PRESETS:
        raise ValueError(f"A preset named {preset.name!r} is already registered. Choose another name.")
    _PRESETS[preset.name] = preset
    return preset


def preset_names() -> list[str]:
    """List the registered presets.

    Returns:
        Their names, in the order of registration.
    """
    return list(_PRESETS)


def get_preset(name: str) -> Preset:
    """Look a preset up by name.

    Args:
        name: As the configuration says; case and `-` do not matter.

    Returns:
        The preset.

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
    """Find the preset that belongs to a hub dataset.

    Args:
        hub_id: The dataset's id.

    Returns:
        The preset, or None.
    """
    return next((p for p in _PRESETS.values() if p.hub_id is not None and p.hub_id.lower() == hub_id.lower()), None)


def recognise(row: Row) -> Preset | None:
    """Find the preset whose columns a row has.

    The form with the most columns wins: the 16 columns of PKU-SafeRLHF also hold its older 7.

    Args:
        row: The first row of a file.

    Returns:
        The preset, or None when no form fits or two fit equally well.
    """
    scores: list[tuple[int, Preset]] = []
    for preset in _PRESETS.values():
        sizes = [len(names) for names in preset.requires if all(name in row for name in names)]
        if sizes and (preset.recognise is None or preset.recognise(row)):
            scores.append((max(sizes), preset))
    if not scores:
        return None
    best = max(size for size, _ in scores)
    winners = [preset for size, preset in scores if size == best]
    return winners[0] if len(winners) == 1 else None


def nearest(columns: Iterable[str]) -> list[str]:
    """Name the presets that share the most columns with a file, for a message.

    Args:
        columns: The file's columns.

    Returns:
        Up to three presets with the columns that they need.
    """
    have = set(columns)
    forms = [
        (len(have & set(names)) / len(names), preset.name, names)
        for preset in _PRESETS.values()
        for names in preset.requires
    ]
    return [
        f"{name} ({', '.join(names)})" for share, name, names in sorted(forms, key=lambda f: -f[0])[:3] if share > 0
    ]
