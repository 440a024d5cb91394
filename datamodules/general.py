"""General-capability data: the text that the null space protects, and held-out questions to measure it."""

from __future__ import annotations

from typing import Literal

from typing_extensions import override

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.prompts import PromptDataModule
from nspo_lightning.datamodules.sources.domain import DomainSources
from nspo_lightning.datamodules.sources.errors import DataError
from nspo_lightning.datamodules.sources.read import SourceReport, announce
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import Sources, as_sources, with_system
from nspo_lightning.datamodules.text.calibration_text import (
    AnswerFn,
    CalibrationText,
    calibration_text,
    choose_calibration_rows,
    collate_calibration,
    mix_batches,
    with_model_answers,
)
from nspo_lightning.datamodules.text.render import Tokenizer


class GeneralDataModule(PromptDataModule):
    """General data: calibration text and held-out evaluation rows.

    Args:
        train: Where calibration text comes from; several sources are mixed by weight, equally by default.
        val: Validation rows; held out of `train` when None.
        test: Test rows; held out of `train` when None.
        batch_size: Rows a training batch and rank, for training on general data.
        eval_batch_size: Rows an evaluation batch and rank.
        val_size: Validation rows; None = a world's own split, else a tenth, at most 500.
        test_size: Test rows, likewise.
        calibration_size: Rows that the null space is computed from; None = all.
        calibration_text: The prompt alone, with its reference answer, or with the policy's own answer.
        calibration_batch_size: Rows a calibration batch and rank.
        calibration_max_tokens: The longest calibration text; longer rows are left out and reported.
        calibration_padding: Where short calibration rows are padded.
        max_prompt_tokens: The longest rendered prompt; longer rows are left out and reported.
        system_prompt: A system message for prompts that have none, unless their source sets its own.
        chat_template: A Jinja template or its path, where the tokenizer's own is missing or wrong.
        seed: Decides order, held-out and calibration rows.
        tokenizer: The policy's tokenizer; taken from the LightningModule when None.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        train: Sources,
        *,
        val: Sources | None = None,
        test: Sources | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 32,
        val_size: int | None = None,
        test_size: int | None = None,
        calibration_size: int | None = 1024,
        calibration_text: CalibrationText = "prompt_and_answer",
        calibration_batch_size: int = 16,
        calibration_max_tokens: int | None = None,
        calibration_padding: Literal["left", "right"] = "right",
        max_prompt_tokens: int | None = None,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for name, value in (
            ("calibration_size", calibration_size),
            ("calibration_batch_size", calibration_batch_size),
            ("calibration_max_tokens", calibration_max_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        super().__init__(
            DomainSources(
                train=with_system(as_sources(train, "general"), system_prompt),
                validation=with_system(as_sources(val, "general_val"), system_prompt),
                test=with_system(as_sources(test, "general_test"), system_prompt),
                kind="benign",
                validation_size=val_size,
                test_size=test_size,
                seed=seed,
            ),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_prompt_tokens=max_prompt_tokens,
            chat_template=chat_template,
            tokenizer=tokenizer,
        )
        self.calibration_size = calibration_size
        self.calibration_text: CalibrationText = calibration_text
        self.calibration_batch_size = calibration_batch_size
        self.calibration_max_tokens = calibration_max_tokens
        self.calibration_padding: Literal["left", "right"] = calibration_padding
        self.seed = seed
        self.calibration_report: SourceReport | None = None

    @override
    def train_dataloader(self) -> PromptLoader:
        return self.train_loader(seed=self.seed, repeat_batches=1, stop="shortest")

    def calibration_rows(self, answer_fn: AnswerFn | None = None) -> list[PromptRow]:
        """Draw the rows that the null space is computed from.

        Args:
            answer_fn: Answers prompts, for `prompt_and_model_answer`.

        Returns:
            The rows that fit, with the answers that belong to the chosen text.

        Raises:
            DataError: If none fits.
        """
        rows = self.loaded()
        by_model = self.calibration_text == "prompt_and_model_answer"
        chosen, passed_over = choose_calibration_rows(
            rows.train, rows.weights, self.calibration_size, self.seed, fits=lambda row: by_model or self._fits(row)
        )
        report = SourceReport(label="calibration", read=len(chosen) + passed_over, role="calibration")
        if by_model:
            answered = with_model_answers(chosen, answer_fn, self.calibration_batch_size)
            chosen = [row for row in answered if self._fits(row)]
            passed_over = len(answered) - len(chosen)
        if passed_over:
            report.dropped[f"longer than {self.calibration_max_tokens} tokens"] = passed_over
        if not chosen:
            raise DataError(
                "the calibration rows",
                f"all {passed_over} are longer than {self.calibration_max_tokens} tokens",
                "Raise `calibration_max_tokens`, or set `calibration_text: prompt`.",
            )
        if self.calibration_text == "prompt_and_answer" and (missing := sum(not row.answer for row in chosen)):
            report.notes.append(f"{missing} rows have no answer: their prompt alone is used")
        self.calibration_report = report
        return mix_batches(chosen, self.calibration_batch_size, self.seed)

    def _fits(self, row: PromptRow) -> bool:
        if self.calibration_max_tokens is None:
            return True
        text = calibration_text(row, self.calibration_text, self.renderer)
        return len(self.renderer.encode([text])[0]) <= self.calibration_max_tokens

    def calibration_dataloader(self, answer_fn: AnswerFn | None = None) -> PromptLoader:
        """Batches of general text for the null space.

        Args:
            answer_fn: Answers prompts, for `prompt_and_model_answer`; default: the LightningModule's.

        Returns:
            A loader of `input_ids`, `attention_mask` and `domain`.
        """
        if answer_fn is None and self.trainer is not None:
            answer_fn = getattr(self.trainer.lightning_module, "calibration_answers", None)
        rows, renderer = self.calibration_rows(answer_fn), self.renderer
        if self.calibration_report is not None:
            announce([self.calibration_report])
        return PromptLoader(
            [rows],
            lambda batch: collate_calibration(batch, self.calibration_text, renderer, self.calibration_padding),
            batch_size=self.calibration_batch_size,  # the same on every rank: `calibrate_modules` deals batches out
        )
