"""From rows to batches of tensors: prompts, calibration text, scored text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.text.render import ChatRenderer
from nspo_lightning.nullspace.domains import START_TOKENS, TO_LEARN, are_starts
from nspo_lightning.policy.turns import common_start

CalibrationText = Literal["prompt", "prompt_and_answer", "prompt_and_model_answer"]
Side = Literal["left", "right"]


def is_start_alone(skill: str) -> bool:
    """Return whether rows of a skill have an answer of the base itself, of which only the start is looked at."""
    return skill == TO_LEARN or are_starts(skill)


def pad_token_ids(ids: Sequence[Sequence[int]], pad_token_id: int, side: Side) -> tuple[Tensor, Tensor]:
    """Return token ids padded to the longest row, and the mask (True = real token), both of shape (rows, longest)."""
    rows = [torch.tensor(row, dtype=torch.long) for row in ids]
    real = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    padded = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side)
    return padded, pad_sequence(real, batch_first=True, padding_side=side)


def gather_columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """Collect the rows' columns, one list a column; a row without one of them holds None there."""
    columns = [row.all_columns() for row in rows]
    names = dict.fromkeys(name for row in columns for name in row)
    return {name: [row.get(name) for row in columns] for name in names}


def collate_prompts(rows: Sequence[PromptRow], renderer: ChatRenderer) -> dict[str, Any]:
    """Return a batch of prompts for rollouts and evaluation.

    It has `prompt` (text or chats), `prompt_ids` and `prompt_mask` (True = real token) of shape (rows, prompt tokens),
    left-padded, and `columns`. Of rows under attack it also has `request`, what judges shall see, and of begun answers
    `prefix_tokens` and `prefix_text`, a list each.
    """
    ids, mask = pad_token_ids(renderer.encode_prompts(rows), renderer.pad_token_id, "left")
    attacked: dict[str, Any] = {}
    if any(row.request is not None for row in rows):
        attacked["request"] = [row.prompt if row.request is None else row.request for row in rows]
    if any(row.prefix_tokens or row.prefix_text for row in rows):
        attacked["prefix_tokens"] = [row.prefix_tokens for row in rows]
        attacked["prefix_text"] = [row.prefix_text for row in rows]
    return {
        **attacked,
        "prompt": [row.prompt for row in rows],
        "prompt_ids": ids,
        "prompt_mask": mask,
        "columns": gather_columns(rows),
    }


def calibration_text(row: PromptRow, text: CalibrationText, renderer: ChatRenderer) -> str:
    """Render the prompt for an answer to come, or the whole exchange where one is wanted and there is one."""
    # A model's own answer stands where it was written: a template that renders it may drop its thought, or add one.
    if text == "prompt_and_model_answer" and row.answer:
        return renderer.text(row.prompt) + row.answer + renderer.text_behind_answer(row.prompt)
    return renderer.text(row.prompt, row.answer if text != "prompt" and row.answer else None)


def is_cut_by_template(row: PromptRow, renderer: ChatRenderer) -> bool:
    """Whether the template drops a part of a reference answer, such as its thought; white space does not count."""
    return "".join(row.answer.split()) not in "".join(renderer.text(row.prompt, row.answer).split())


def collate_calibration(
    rows: Sequence[PromptRow], text: CalibrationText, renderer: ChatRenderer, side: Side
) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` (1 = real token) and `answer_starts`, shape (rows, tokens), and `domain`.

    `answer_starts` is True at the last token of the prompt and at the first `START_TOKENS` of its answer, if there are
    any. There is one domain a row, its skill. Rows that are there for it alone (`is_start_alone`) end there.
    """
    used = ["prompt_and_model_answer" if is_start_alone(row.skill) else text for row in rows]
    texts = renderer.encode([calibration_text(row, use, renderer) for row, use in zip(rows, used, strict=True)])
    prompts = renderer.encode_prompts(rows)
    firsts = [max(common_start(whole, prompt) - 1, 0) for whole, prompt in zip(texts, prompts, strict=True)]
    ends = [first + 1 + START_TOKENS for first in firsts]
    texts = [
        whole[:end] if is_start_alone(row.skill) else whole for row, whole, end in zip(rows, texts, ends, strict=True)
    ]
    ids, mask = pad_token_ids(texts, renderer.pad_token_id, side)
    starts = torch.zeros_like(mask)
    for i, (whole, first, end) in enumerate(zip(texts, firsts, ends, strict=True)):
        padded = ids.shape[1] - len(whole) if side == "left" else 0
        starts[i, first + padded : end + padded] = True
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "answer_starts": starts & mask,
        "domain": [row.skill for row in rows],
    }


def collate_text(rows: Sequence[PromptRow], renderer: ChatRenderer, max_tokens: int | None = None) -> dict[str, Any]:
    """Return a batch of text to score, cut at its end where it is longer than `max_tokens`.

    It has `input_ids`, `attention_mask` and `labels_mask` (1 = score this token: the answer's, with the end of its
    turn; all tokens of a row without an answer) of shape (rows, tokens), right-padded; `domain`, one name a row.
    """
    texts = [_scored(row, renderer) for row in rows]
    ids, mask = pad_token_ids([text[:max_tokens] for text, _, _ in texts], renderer.pad_token_id, "right")
    bounds = torch.tensor([[start, stop] for _, start, stop in texts]).reshape(-1, 2, 1)
    columns = torch.arange(ids.shape[1])
    labels = mask & (columns >= bounds[:, 0]) & (columns < bounds[:, 1])
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels_mask": labels.long(),
        "domain": [row.skill for row in rows],
    }


def _scored(row: PromptRow, renderer: ChatRenderer) -> tuple[list[int], int, int]:
    """Return a row's ids and which of them [start, stop) are scored."""
    if row.answer:
        return renderer.encode_answer(row.prompt, row.answer)
    (ids,) = renderer.encode_prompts([row])
    return ids, 0, len(ids)
