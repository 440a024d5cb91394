"""Which general rows are calibrated on and which are scored, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nspo_lightning.datamodules.sources.data_error import DataError
from nspo_lightning.datamodules.sources.order import shares
from nspo_lightning.datamodules.sources.rows import PromptRow, hash_rank, rank_all, take_ranked
from nspo_lightning.terminal import counted, rows_progress

AnswerFn = Callable[..., list[str]]
"""Answers a list of prompts with the policy. It may be asked with a second argument, the most tokens of an answer, as
`GRPOModule.calibration_answers` can."""


def choose_calibration_rows(
    sources: Sequence[Sequence[PromptRow]],
    weights: Sequence[float],
    size: int | None,
    seed: int,
    fits: Callable[[PromptRow], bool],
) -> tuple[list[PromptRow], int]:
    """Choose the calibration rows from a mixture without repeating any.

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
    waiting = [iter([rows[i] for i in rank_all(rows, f"calibration {seed}")]) for rows in sources]
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


def _text_length(row: PromptRow) -> int:
    return len(row.key) + len(row.answer)


def mix_batches(rows: Sequence[PromptRow], batch_size: int, seed: int) -> list[PromptRow]:
    """Return the rows so that a batch holds texts of like length, and batches of all sources alternate.

    Like lengths save padding; the alternation makes any first part of the batches a fair sample of the whole.
    """
    by_length = sorted(rows, key=_text_length)
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    last = batches.pop() if batches and len(batches[-1]) < batch_size else []  # a short one must stay at the end
    ranked = sorted(batches, key=lambda batch: hash_rank(batch[0].key, f"batches {seed}"))
    return [row for batch in ranked for row in batch] + last


def with_model_answers(
    rows: Sequence[PromptRow], answer_fn: AnswerFn | None, batch_size: int, max_new_tokens: int | None = None
) -> list[PromptRow]:
    """Return the rows with a model's answers in the place of the reference answers.

    Args:
        rows: What is answered.
        answer_fn: Answers prompts; of a `GRPOModule` it is the base that does.
        batch_size: Prompts that are answered at once.
        max_new_tokens: The most tokens of an answer; None = as `answer_fn` decides.

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
    with rows_progress("Answering calibration prompts", len(rows)) as advance:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts = [row.prompt for row in part]
            answers = answer_fn(prompts) if max_new_tokens is None else answer_fn(prompts, max_new_tokens)
            if len(answers) != len(part):
                raise DataError(
                    "`answer_fn`",
                    f"it gave {counted(len(answers), 'answer')} to {counted(len(part), 'prompt')}",
                    "Give one answer a prompt.",
                )
            answered += [replace(row, answer=answer) for row, answer in zip(part, answers, strict=True)]
            advance(len(part))
    return answered


def choose_text_rows(rows: Sequence[PromptRow], size: int | None) -> list[PromptRow]:
    """Return `size` rows to score (None = all), as many of each skill as possible alike.

    They have an answer, or are of all kinds if none has one (then whole texts are scored). Longest last, so that
    batches hold texts of like length.
    """
    usable = [row for row in rows if row.answer] or list(rows)
    by_skill: dict[str, list[PromptRow]] = {}
    for row in usable:
        by_skill.setdefault(row.skill, []).append(row)
    left = len(usable) if size is None else min(size, len(usable))
    chosen: list[PromptRow] = []
    smallest_first = sorted(by_skill.values(), key=len)
    for index, members in enumerate(smallest_first):
        share = min(len(members), -(-left // (len(smallest_first) - index)))
        chosen += [members[i] for i in take_ranked(members, share, "text 0")]
        left -= share
    return sorted(chosen, key=_text_length)
