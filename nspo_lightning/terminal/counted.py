"""A number with its noun."""

from __future__ import annotations

_HISSES = ("s", "x", "ch", "sh")


def counted(count: int, one: str, more: str = "") -> str:
    """Return a number with its noun, in the singular where it is 1.

    Args:
        count: The number.
        one: The noun, or the rest of the sentence, for 1.
        more: The same for any other number; "" = `one` and an s (es, where it ends in a hiss).

    Example:
        >>> counted(1, "update"), counted(1200, "batch"), counted(0, "row is", "rows are")
        ('1 update', '1,200 batches', '0 rows are')
    """
    if count == 1:
        return f"{count} {one}"
    return f"{count:,} {more or one + ('es' if one.endswith(_HISSES) else 's')}"
