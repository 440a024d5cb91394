"""Presets: how the rows of a public dataset become prompts.

Adding one is one entry, ``register(Preset(name=..., kind=..., requires=(("a", "b"),), prompt="a", ...))``; an optional
hub id lets a configuration name the preset alone. A preset is recognised by its columns, so that a path is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        free_text: Whether answers are free text: scored by their likelihood, never compared.
        target: The column with the beginning of an answer that complies.
        skill: The name under which results are reported, or a function of the row; the preset's name when None.
        keep: Columns that go along with the row (those that it has).
        skip: Gives the reason why a row is left out, or None.
        recognise: A further condition on a row for being recognised by its columns.
        id_column: A column whose values should differ; repeated ones are said.
        hub_id: The dataset on the Hugging Face hub.
        hub_name: Configuration of the hub dataset.
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
    prompt: str | Callable[[Row], Prompt] = "prompt"
    kind_of_part: dict[str, Kind] = field(default_factory=dict)
    answer: TextField | None = None
    final_answer: TextField | None = None
    free_text: bool = False
    target: str | None = None
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
        """Whether a row has the columns of one of the known forms, so that the preset can read it."""
        return any(all(name in row for name in names) for names in self.requires)


def first_of(*columns: str) -> Callable[[Row], Any]:
    """Make a field that is read from the first of several columns that a row has."""
    return lambda row: row[next(column for column in columns if column in row)]


def text_of(row: Row, column: str) -> str:
    """Return a row's text, for prompts that are put together from several columns.

    Raises:
        ValueError: If the column holds something else.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {'null' if value is None else type(value).__name__}, not text")
    return value
