"""General-capability text for the null space: which rows, which text, which tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from nspo_lightning.datamodules.sources.errors import DataError
from nspo_lightning.datamodules.sources.order import shares
from nspo_lightning.datamodules.sources.rows import Prompt, PromptRow, hash_rank, rank_all
from nspo_lightning.datamodules.text.collate import pad
from nspo_lightning.datamodules.text.render import ChatRenderer

CalibrationText = Literal["prompt", "prompt_and_answer", "prompt_and_model_answer"]
AnswerFn = Callable[[list[Prompt]], list[str]]
"""Answers prompts with the policy, for `prompt_and_model_answer`."""


def choose_calibration_rows(
    sources: Sequence[Sequence[PromptRow]],
    weights: Sequence[float],
    size: int | None,
    seed: int,
    fits: Callable[[PromptRow], bool],
) -> tuple[list[PromptRow], int]:
    """Draw the calibration rows from a mixture without repeating any.

    Args:
        sources: The training rows of each source.
        weights: Their shares.
        size: How many rows in all; None takes every row, whatever the weights.
        seed: Decides which.
        fits: Whether a row's text is short enough.

    Returns:
        The rows, source by source, and how many were passed over because they do not fit. A source that is too small
        gives all it has, and the others fill its place.
    """
    chosen: list[list[PromptRow]] = [[] for _ in sources]
    waiting = [iter([rows[i] for i in rank_all(list(rows), f"calibration {seed}")]) for rows in sources]
    size = sum(len(rows) for rows in sources) if size is None else size
    passed_over = 0
    open_sources = list(range(len(sources)))
    while (missing := size - sum(len(rows) for rows in chosen)) > 0 and open_sources:
        exhausted = set()
        for index, share in zip(open_sources, shares([weights[i] for i in open_sources], missing), strict=True):
            target = len(chosen[index]) + share
            while len(chosen[index]) < target:
                row = next(waiting[index], None)
                if row is None:
                    exhausted.add(index)
                    break
                if fits(row):
                    chosen[index].append(row)
                else:
                    passed_over += 1
        open_sources = [i for i in open_sources if i not in exhausted]
    return [row for rows in chosen for row in rows], passed_over


def mix_batches(rows: Sequence[PromptRow], batch_size: int, seed: int) -> list[PromptRow]:
    """Order rows so that a batch holds texts of like length, and batches of all sources alternate.

    Like lengths save padding; the alternation makes any first part of the batches a fair sample of the whole.

    Args:
        rows: The calibration rows.
        batch_size: Rows a batch.
        seed: Decides the order of the batches.

    Returns:
        The same rows.
    """
    by_length = sorted(rows, key=lambda row: len(row.key) + len(row.answer))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    last = batches.pop() if batches and len(batches[-1]) < batch_size else []  # a short one must stay at the end
    ranked = sorted(batches, key=lambda batch: hash_rank(batch[0].key, f"batches {seed}"))
    return [row for batch in ranked for row in batch] + last


def with_model_answers(rows: Sequence[PromptRow], answer_fn: AnswerFn | None, batch_size: int) -> list[PromptRow]:
    """Put the policy's own answers in the place of the reference answers.

    Args:
        rows: The calibration rows.
        answer_fn: Answers a list of prompts.
        batch_size: Prompts a call.

    Returns:
        The rows with new answers.

    Raises:
        DataError: If there is no `answer_fn`, or it gives another number of answers.
    """
    if answer_fn is None:
        raise DataError(
            "calibration_text: prompt_and_model_answer",
            "nothing answers prompts here",
            "Pass `calibration_dataloader(answer_fn=...)`, or use `prompt_and_answer`.",
        )
    answered: list[PromptRow] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        answers = answer_fn([row.prompt for row in part])
        if len(answers) != len(part):
            raise DataError(
                "`answer_fn`", f"it gave {len(answers)} answers to {len(part)} prompts", "Give one answer a prompt."
            )
        answered += [replace(row, answer=answer) for row, answer in zip(part, answers, strict=True)]
    return answered


def calibration_text(row: PromptRow, text: CalibrationText, renderer: ChatRenderer) -> str:
    """Render a calibration row.

    Args:
        row: The row.
        text: What it consists of.
        renderer: Applies the chat template.

    Returns:
        The prompt with the generation prompt, or the whole exchange where an answer is wanted and there is one.
    """
    return renderer.text(row.prompt, row.answer if text != "prompt" and row.answer else None)


def collate_calibration(
    rows: Sequence[PromptRow], text: CalibrationText, renderer: ChatRenderer, side: Literal["left", "right"]
) -> dict[str, Any]:
    """Build a calibration batch.

    Args:
        rows: The rows.
        text: What each text consists of.
        renderer: Applies the chat template.
        side: Where short rows are padded.

    Returns:
        `input_ids` and `attention_mask` (1 = real token) of shape (rows, tokens), and `domain`, one name a row.
    """
    ids, mask = pad(
        renderer.encode([calibration_text(row, text, renderer) for row in rows]), renderer.pad_token_id, side
    )
    return {"input_ids": ids, "attention_mask": mask.long(), "domain": [row.skill for row in rows]}
