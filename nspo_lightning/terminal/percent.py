"""A share in per cent."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share in per cent, to the digits that tell a few from none.

    Example:
        >>> percent(0.274), percent(4 / 576), percent(0.0)
        ('27', '0.69', '0')
    """
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.2g}"
