"""Spans of time: as a clock beside a bar, and as words in a sentence."""

from __future__ import annotations


def clock_time(seconds: float) -> str:
    """Return seconds as `m:ss`, or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Return a span as people say it.

    Example:
        >>> duration(42), duration(111), duration(840), duration(7300)
        ('42 s', '111 s', '14 min', '2 h 2 min')
    """
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
