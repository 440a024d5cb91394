"""What a cell of a table says: nothing, a label of harm, or something that no row can use."""

from __future__ import annotations

from numbers import Real
from typing import Any

from nspo_lightning.datamodules.sources.data_error import clip
from nspo_lightning.datamodules.sources.source import Kind
from nspo_lightning.rewards.rules.labels import LABELS, truth_value

MAX_PROMPT_CHARS = 1_000_000
_MISSING_TYPES = ("NAType", "NaTType")  # pandas' own, which no file holds but a function of rows may give
_MISSING_WORDS = ("nan", "NaN", "<NA>")


class BadRow(ValueError):
    """A row that cannot be used: `bad_rows` decides whether it stops the run."""


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, or NaN, which tables put where a number or a text is missing."""
    return value is None or (isinstance(value, Real) and value != value) or type(value).__name__ in _MISSING_TYPES


def csv_value(text: str) -> str | None:
    """Return a csv field; None where a table was written with its missing values spelt out (nan, NaN, <NA>)."""
    return None if text.strip() in _MISSING_WORDS else text


def kind_of(label: Any, column: str, default: Kind | None = None) -> Kind:
    """Return the kind of row that a label of harm names; for an empty one the default, if there is one.

    Raises:
        BadRow: If it is no word of the vocabulary (see `truth_value`).
    """
    if default is not None and (label is None or label == ""):
        return default
    truth = truth_value(label)
    if truth is None:
        raise BadRow(
            f"the column {column!r} says neither harmful nor benign: {clip(repr(label), 60)} is none of {LABELS} "
            "(the source's own `kind` replaces the column)"
        )
    return "harmful" if truth else "benign"


def check_prompt(value: Any) -> str:
    """Return what stands in the prompt's column, unchanged, if it can be a prompt.

    Raises:
        BadRow: If it is null, not text, empty or absurdly long.
    """
    if value is None:
        raise BadRow("the prompt is null")
    if not isinstance(value, str):
        raise BadRow(f"the prompt is {type(value).__name__}, not text: {clip(repr(value), 60)}")
    if not value.strip():
        raise BadRow("the prompt is empty")
    if len(value) > MAX_PROMPT_CHARS:
        raise BadRow(f"the prompt has {len(value):,} characters, more than {MAX_PROMPT_CHARS:,}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow("the prompt holds half of a surrogate pair, which no UTF-8 text can")
    return value
