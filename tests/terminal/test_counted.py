"""Numbers with their nouns: whoever did one thing is not told of "1 things"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_run import made_run

from nspo_lightning.evaluation.diagnosis import RunFacts, TrainingFacts, diagnose
from nspo_lightning.report import read_run
from nspo_lightning.report.words import lede
from nspo_lightning.terminal import counted
from nspo_lightning.terminal.progress import Work


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (counted(1, "update"), "1 update"),
        (counted(0, "update"), "0 updates"),
        (counted(12345, "row"), "12,345 rows"),
        (counted(2, "batch"), "2 batches"),
        (counted(1, "pass"), "1 pass"),
        (counted(2, "pass"), "2 passes"),
        (counted(1, "row has", "rows have"), "1 row has"),
        (counted(2, "matrix", "matrices"), "2 matrices"),
    ],
)
def test_the_noun_fits_the_number(said: str, expected: str) -> None:
    assert said == expected


def test_a_bar_of_one_row_says_row() -> None:
    work = Work(label="Reading", total=1, unit="row", clock=lambda: 0.0)
    assert work.begun() == "Reading: 1 row ..."
    work.advance(1, None)
    assert (work.counted(), work.ended()) == ("1 of 1 row", "Reading: 1 row in 0:00")


def test_a_page_and_a_diagnosis_of_one_update_say_update(tmp_path: Path) -> None:
    run = replace(read_run(made_run(tmp_path / "run")), updates=1, skipped=0, seconds=5.0)
    assert lede(run).startswith("1 update in 5 s")
    facts = RunFacts(training=TrainingFacts(groups=4, with_signal=2, updates=1, skipped=3))
    assert any("3 of 4 steps moved no weight" in one.text and "1 update stands." in one.text for one in diagnose(facts))
