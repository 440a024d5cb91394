"""Which rows of a source are read, by the values of their columns."""

from __future__ import annotations

from nspo_lightning.datamodules.sources.data_error import DataError, listing
from nspo_lightning.datamodules.sources.rows import RawRow
from nspo_lightning.datamodules.sources.source import PromptSource, values_of

NOT_CHOSEN = "not chosen by `only` or `without`"
"""Why such a row is left out."""


class RowChoice:
    """Chooses the rows of one source, and knows afterwards which of the values that it was given no row had."""

    def __init__(self, source: PromptSource) -> None:
        given = {"only": source.only or {}, "without": source.without or {}}
        self._label = source.label
        self._values = [
            (field, column, values_of(value)) for field, columns in given.items() for column, value in columns.items()
        ]
        self._found: dict[str, set[str]] = {}

    def takes(self, raw: RawRow) -> bool:
        """Return whether a row is read.

        Raises:
            DataError: If it lacks a column that is asked for.
        """
        taken = True
        for field, column, values in self._values:
            if column not in raw.data:
                raise DataError(
                    raw.where,
                    f"`{field}` asks for the column {column!r}; the row has {listing(list(raw.data), 20)}",
                    "Name a column that every row has.",
                )
            value = str(raw.data[column]).strip()
            self._found.setdefault(column, set()).add(value)
            taken = taken and (value in values) == (field == "only")
        return taken

    def check_found(self) -> None:
        """Check, once all rows were seen, that every value was there, and none in another case too.

        A word that is spelt wrong chooses nothing, and one that is spelt in two ways only half of what is meant.

        Raises:
            DataError: With the values that are wrong, and those that are there.
        """
        for field, column, values in self._values:
            found = self._found.get(column, set())
            if absent := [value for value in values if value not in found]:
                raise DataError(
                    self._label,
                    f"no row has {listing(absent)} in the column {column!r}, which `{field}` names",
                    f"The column holds {listing(sorted(found), 20)}.",
                )
            alike = {value.casefold() for value in values}
            if others := sorted(value for value in found if value.casefold() in alike and value not in values):
                raise DataError(
                    self._label,
                    f"the column {column!r} also holds {listing(others)}, spelt otherwise than `{field}` has it",
                    "Name every spelling, or mend the file.",
                )
