"""The error for bad data: where it is, what was found and how to mend it, on one screen."""

from __future__ import annotations

_MAX_FOUND_CHARS = 400


class DataError(ValueError):
    """Data that cannot be used, raised before any training starts: where it is, what was found, and what cures it."""

    def __init__(self, where: str, found: str, cure: str) -> None:
        self.where = where
        self.found = found
        self.cure = cure
        super().__init__(f"Cannot use {where}: {clip(found)}\n  How to mend it: {cure}")


def clip(text: str, limit: int = _MAX_FOUND_CHARS) -> str:
    """Keep at most `limit` characters of text for a message; control characters are escaped, a cut is marked."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return printable if len(text) <= limit else printable[:limit] + "…"


def listing(values: list[str], limit: int = 8) -> str:
    """Join names for a message, at most `limit` of them: ``'a', 'b' and 3 more``."""
    shown = ", ".join(repr(clip(v, 60)) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
