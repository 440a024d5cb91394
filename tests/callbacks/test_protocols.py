"""The project's own module and datamodule offer all that callbacks ask for: nothing is skipped without a word."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from tiny_jobs import datamodule, module

from nspo_lightning import ranks
from nspo_lightning.callbacks import NullSpaceProjection, protocols


@pytest.mark.parametrize(
    "asked",
    [
        protocols.AnswersPrompts,
        protocols.AnswersTests,
        protocols.CountsRates,
        protocols.CountsUpdates,
        protocols.Evaluable,
        protocols.GoesBack,
        protocols.KeepsRollout,
        protocols.KeepsStepState,
        protocols.LimitsContext,
        protocols.ScoresText,
    ],
)
def test_the_module(asked):
    assert isinstance(module("unused"), asked)


@pytest.mark.parametrize("asked", [protocols.HasCalibrationText, protocols.HasEvalRows, protocols.HasHeldOutText])
def test_the_datamodule(asked):
    assert isinstance(datamodule(), asked)


def test_a_module_that_cannot_say_what_it_measures_is_none_that_answers_tests():
    """`TestReport` passes over it, instead of failing after the whole test."""

    class Half(pl.LightningModule):
        def base_answer(self, batch, dataloader_idx, batch_idx): ...

        def text_scores(self, batch): ...

    assert not isinstance(Half(), protocols.AnswersTests)


def test_the_projection_certifies():
    assert isinstance(NullSpaceProjection(), protocols.Certifies)


def test_errors_say_whether_all_ranks_raise_them():
    assert not ranks.raised_on_all_ranks(ValueError())
    together = KeyboardInterrupt()
    together.raised_on_all_ranks = True  # type: ignore[attr-defined]
    assert ranks.raised_on_all_ranks(together)
