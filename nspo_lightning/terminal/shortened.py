"""Values of settings in a sentence or a table cell."""

from __future__ import annotations

from typing import Any


def shortened(value: Any, most: int) -> str:
    """Return a value as it stands in YAML, cut after so many characters.

    Example:
        >>> shortened(None, 10), shortened("a long name", 6)
        ('null', 'a long...')
    """
    text = "null" if value is None else str(value)
    return text if len(text) <= most else text[:most] + "..."
