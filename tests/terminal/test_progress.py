"""Progress: one bar that stays one and goes away in a terminal, a line a minute elsewhere, silence on other ranks."""

from __future__ import annotations

import logging
import sys

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from screen import screen, terminal

from nspo_lightning.terminal.progress import Work, rows_progress


class Clock:
    """Seconds that pass when told so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_first_line_then_one_a_minute_and_a_last_one(capsys):
    clock = Clock()
    with rows_progress("Measuring before training", 1300, clock=clock) as advance:
        assert lines_of(capsys) == ["Measuring before training: 1,300 rows ..."]
        for _ in range(130):
            clock.now += 7.0
            advance(10)
        told = lines_of(capsys)
    assert told[0] == "Measuring before training: 90 of 1,300 rows, 14:07 left"
    assert len(told) == 14  # 910 seconds, a line every 63
    assert lines_of(capsys) == ["Measuring before training: 1,300 rows in 15:10"]


def test_short_work_gets_one_line_in_a_log(capsys):
    clock = Clock()
    with rows_progress("Scoring", 100, clock=clock) as advance:
        for _ in range(100):
            clock.now += 0.5
            advance()
    assert lines_of(capsys) == ["Scoring: 100 rows ..."]


def test_work_inside_of_other_work_is_told_of_in_a_log_only_when_it_is_long(capsys):
    clock = Clock()
    with rows_progress("Training", 80, unit="update", done=20, clock=clock) as trained:
        for step in range(2):
            clock.now += 30.0
            trained(note=f"reward {step}")
            with rows_progress("Validation", 4, clock=clock) as advance:
                for _ in range(4):
                    clock.now += 20.0 if step else 1.0
                    advance()
    assert lines_of(capsys) == [
        "Training: 80 updates ...",
        # 64 s for two updates: what was done before the start says nothing about the speed.
        "Training: 22 of 80 updates, 30:56 left, reward 1",
        "Validation: 3 of 4 rows, 0:20 left",
        "Validation: 4 rows in 1:20",
        "Training: 22 updates in 2:24",
    ]


def test_an_unknown_total_has_no_time_left(capsys):
    clock = Clock()
    with rows_progress("Reading", clock=clock) as advance:
        clock.now += 61.0
        advance(1200)
    assert lines_of(capsys) == ["Reading ...", "Reading: 1,200 rows", "Reading: 1,200 rows in 1:01"]


def test_time_left_runs_down_while_a_long_row_is_under_way():
    clock = Clock()
    work = Work(label="Training", total=4, unit="update", clock=clock)
    assert work.left is None
    clock.now += 10.0
    work.advance(1, None)
    assert work.left == 30.0
    clock.now += 4.0
    assert work.left == 26.0
    clock.now += 40.0
    assert work.left == 0.0


def test_other_ranks_and_who_wants_none_see_nothing(capsys, monkeypatch):
    clock, console = Clock(), terminal()
    for visible, rank in ((False, 0), (True, 1)):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        with rows_progress("Scoring", 2, visible=visible, console=console, clock=clock) as advance:
            clock.now += 100.0
            advance()
    assert lines_of(capsys) == []
    assert screen(console) == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_is_one_line_with_rows_and_time_left_and_goes_away(width):
    clock, console = Clock(), terminal(width)
    console.print("before")
    with rows_progress("Measuring before training", 1300, console=console, clock=clock) as advance:
        clock.now += 60.0
        advance(400, note="reward 0.31, unsafe 45 %" + " and much more" * 9)
        console.print("meanwhile")
        seen = screen(console)
        assert seen[:2] == ["before", "meanwhile"]
        assert len(seen) == 3
        assert len(seen[2]) <= width
        assert "400 of 1,300 rows" in seen[2]
        assert "2:15 left" in seen[2]
    console.print("after")
    assert screen(console) == ["before", "meanwhile", "after"]


def test_bars_inside_of_bars_and_log_lines_leave_no_copy(monkeypatch):
    """A log handler keeps the stream that it was made with: its lines must not be written into the bars."""
    clock, console = Clock(), terminal()
    logger = logging.getLogger("tests.terminal")
    monkeypatch.setattr(sys, "__stderr__", console.file)
    monkeypatch.setattr(sys, "stderr", console.file)
    handler = logging.StreamHandler(console.file)
    logger.addHandler(handler)
    try:
        with rows_progress("Training", 3, unit="update", console=console, clock=clock) as trained:
            for step in range(3):
                clock.now += 1.0
                trained(note=f"reward {step}")
                with rows_progress("Validation", 2, clock=clock) as advance:
                    advance()
                    logger.warning("log line %d", step)
                    seen = screen(console)
                    assert [line.split()[0] for line in seen[step + 1 :]] == ["Training", "Validation"]
            assert [line.split()[0] for line in screen(console)[3:]] == ["Training"]
        logger.warning("over")
    finally:
        logger.removeHandler(handler)
    assert screen(console) == ["log line 0", "log line 1", "log line 2", "over"]


def test_an_error_takes_the_bar_away_and_is_not_called_an_end(capsys):
    clock, console = Clock(), terminal()

    def interrupted(console):
        with rows_progress("Scoring", 5, console=console, clock=clock) as advance:
            clock.now += 100.0
            advance()
            raise KeyboardInterrupt

    for where in (console, None):
        with pytest.raises(KeyboardInterrupt):
            interrupted(where)
    assert screen(console) == []
    assert lines_of(capsys) == ["Scoring: 5 rows ...", "Scoring: 1 of 5 rows, 6:40 left"]


def test_a_total_that_becomes_known_on_the_way_has_a_time_left(capsys):
    clock = Clock()
    with rows_progress("Loading the policy", unit="tensor", clock=clock) as advance:
        advance(0, total=272)
        for _ in range(68):
            clock.now += 1.0
            advance()
    assert lines_of(capsys) == [
        "Loading the policy ...",
        "Loading the policy: 60 of 272 tensors, 3:32 left",
        "Loading the policy: 68 tensors in 1:08",
    ]
