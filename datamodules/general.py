"""General-capability data: the text that the null space protects, and held-out questions to measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.prompts import PromptDataModule, check_at_least_one
from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.read import SourceReport, announce
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.sources.source import Sources
from nspo_lightning.datamodules.text.collate import (
    CalibrationText,
    Side,
    calibration_text,
    collate_calibration,
    is_cut_by_template,
)
from nspo_lightning.datamodules.text.render import Tokenizer
from nspo_lightning.datamodules.text.text_rows import (
    AnswerFn,
    choose_calibration_rows,
    mix_batches,
    with_model_answers,
)
from nspo_lightning.nullspace.domains import START_TOKENS, TO_LEARN, starts_of
from nspo_lightning.terminal import counted


class GeneralDataModule(PromptDataModule):
    """General data: calibration text and held-out evaluation rows.

    The arguments that are not listed are those of `PromptDataModule`.

    Args:
        train: Where calibration text comes from; several sources are mixed by weight, equally by default.
        batch_size: Rows a training batch and rank, for training on general data.
        calibration_size: Rows that the null space is computed from; None = all.
        calibration_text: The prompt alone, with its reference answer, or with the base's own answer (adapter off).
        calibration_batch_size: Rows a calibration batch and rank.
        calibration_max_tokens: The longest calibration text; longer rows are left out and reported.
        calibration_padding: Where short calibration rows are padded.
        calibration_starts: Further rows of which the criterion `contrast` sees the start of the base's own answer.
        seed: Decides order, held-out and calibration rows.

    Raises:
        ValueError: If a size is out of range.
    """

    domain = "general"
    kind = "benign"

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
        calibration_padding: Side = "right",
        calibration_starts: int = 512,
        max_prompt_tokens: int | None = None,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_at_least_one(
            calibration_size=calibration_size,
            calibration_batch_size=calibration_batch_size,
            calibration_max_tokens=calibration_max_tokens,
        )
        if calibration_starts < 0:
            raise ValueError(f"`calibration_starts` must be at least 0, got {calibration_starts}. 512 is the default.")
        super().__init__(
            train,
            val=val,
            test=test,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            max_prompt_tokens=max_prompt_tokens,
            system_prompt=system_prompt,
            chat_template=chat_template,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.calibration_size = calibration_size
        self.calibration_text = calibration_text
        self.calibration_batch_size = calibration_batch_size
        self.calibration_max_tokens = calibration_max_tokens
        self.calibration_padding = calibration_padding
        self.calibration_starts = calibration_starts
        self.calibration_report: SourceReport | None = None

    def calibration_rows(self, answer_fn: AnswerFn | None = None) -> list[PromptRow]:
        """Return the rows that the null space is computed from: those that fit, with the answers that belong to them.

        `answer_fn` answers prompts, for `prompt_and_model_answer`.

        Raises:
            DataError: If none fits.
        """
        by_model = self.calibration_text == "prompt_and_model_answer"
        chosen, passed_over = self._choose_rows()
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
        if self.calibration_text == "prompt_and_answer":
            if missing := sum(not row.answer for row in chosen):
                report.notes.append(counted(missing, "row has", "rows have") + " no answer: the prompt alone is used")
            if cut := sum(is_cut_by_template(row, self.renderer) for row in chosen if row.answer):
                report.notes.append(f"of {counted(cut, 'answer')} the chat template drops a part, such as a thought")
        self.calibration_report = report
        return mix_batches(chosen, self.calibration_batch_size, self.seed)

    def _choose_rows(self) -> tuple[list[PromptRow], int]:
        """Return the rows to calibrate on, before the policy has answered any, and how many do not fit."""
        rows, by_model = self.loaded(), self.calibration_text == "prompt_and_model_answer"
        return choose_calibration_rows(
            rows.train, rows.weights, self.calibration_size, self.seed, fits=lambda row: by_model or self._fits(row)
        )

    def count_calibration_starts(self) -> int:
        """Return how many rows `starts` adds to the calibration text: of the training rows that are left."""
        return len(self._start_rows(self._choose_rows()[0]))

    def _fits(self, row: PromptRow) -> bool:
        if self.calibration_max_tokens is None:
            return True
        text = calibration_text(row, self.calibration_text, self.renderer)
        return len(self.renderer.encode([text])[0]) <= self.calibration_max_tokens

    def _start_rows(self, others: Sequence[PromptRow]) -> list[PromptRow]:
        """Return `calibration_starts` training rows that are not among others, if there are as many."""
        taken, limit = {row.key for row in others}, self.calibration_max_tokens
        loaded = self.loaded()
        left = [[row for row in rows if row.key not in taken] for rows in loaded.train]
        chosen, _ = choose_calibration_rows(
            left,
            loaded.weights,
            self.calibration_starts,
            self.seed,
            fits=lambda row: limit is None or len(self.renderer.encode_prompts([row])[0]) <= limit,
        )
        return chosen

    def calibration_dataloader(
        self, answer_fn: AnswerFn | None = None, to_learn: Sequence[PromptRow] = (), starts: bool = False
    ) -> PromptLoader:
        """Return batches of general text for the null space, see `collate_calibration`.

        `answer_fn` answers prompts, for `prompt_and_model_answer`; `NullSpaceProjection` passes the module's.
        `to_learn` are prompts that are trained on; they come last, with the start of the base's own answers, and so
        do `calibration_starts` further general rows, which `starts` alone asks for too.
        """
        rows, renderer = self.calibration_rows(answer_fn), self.renderer
        if to_learn or starts:
            further = [replace(row, skill=starts_of(row.skill)) for row in self._start_rows(rows)]
            asked = [*further, *(replace(row, skill=TO_LEARN) for row in to_learn)]
            asked.sort(key=lambda row: len(row.key))  # of like length, for less padding
            rows = rows + with_model_answers(asked, answer_fn, self.eval_batch_size, START_TOKENS + 1)
        if self.calibration_report is not None:
            announce([self.calibration_report])
        return PromptLoader(
            [rows],
            lambda batch: collate_calibration(batch, self.calibration_text, renderer, self.calibration_padding),
            batch_size=self.calibration_batch_size,  # the same on every rank: `calibrate_modules` deals batches out
        )
