"""Spans of time and values, as tables and sentences show them."""

from __future__ import annotations

import pytest

from nspo_lightning.terminal import clock_time, duration, shortened


@pytest.mark.parametrize(
    ("seconds", "said", "ticks"),
    [
        (0, "0 s", "0:00"),
        (59.6, "60 s", "1:00"),
        (599, "599 s", "9:59"),
        (600, "10 min", "10:00"),
        (7170, "2 h 0 min", "1:59:30"),
        (7300, "2 h 2 min", "2:01:40"),
    ],
)
def test_a_span_is_said_in_the_unit_that_is_read_at_once(seconds, said, ticks):
    assert (duration(seconds), clock_time(seconds)) == (said, ticks)


def test_a_value_is_cut_where_it_is_too_long():
    assert [shortened(value, 5) for value in (None, 12345, "123456", "")] == ["null", "12345", "12345...", ""]
