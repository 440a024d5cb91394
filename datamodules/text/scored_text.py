"""Held-out general text as batches to score: which rows, which tensors. Only the answers' tokens are marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nspo_lightning.datamodules.sources.rows import PromptRow, take_ranked
from nspo_lightning.datamodules.text.collate import pad
from nspo_lightning.datamodules.text.render import ChatRenderer


def choose_text_rows(rows: Sequence[PromptRow], size: int | None, seed: int = 0) -> list[PromptRow]:
    """Choose rows to score, as many of each skill as possible alike.

    Args:
        rows: General rows.
        size: How many; None = all.
        seed: Decides which.

    Returns:
        Rows that have an answer; all kinds of rows if none has one (then whole texts are scored). Longest last, so that
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
        chosen += [members[i] for i in take_ranked(members, share, f"text {seed}")]
        left -= share
    return sorted(chosen, key=lambda row: len(row.key) + len(row.answer))


def collate_text(rows: Sequence[PromptRow], renderer: ChatRenderer, max_tokens: int | None = None) -> dict[str, Any]:
    """Build a batch of text to score.

    Args:
        rows: The rows.
        renderer: Applies the chat template.
        max_tokens: Longer texts are cut at their end; None = never.

    Returns:
        `input_ids`, `attention_mask` and `labels_mask` (1 = score this token: the answer's; all tokens of a row without
        an answer) of shape (rows, tokens), right-padded; `domain`, one name a row.
    """
    prompts = renderer.encode([renderer.text(row.prompt) for row in rows])
    texts = renderer.encode([renderer.text(row.prompt, row.answer or None) for row in rows])
    ids, mask = pad([text[:max_tokens] for text in texts], renderer.pad_token_id, "right")
    starts = torch.tensor([len(p) if row.answer else 0 for p, row in zip(prompts, rows, strict=True)])
    labels = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels_mask": labels.long(),
        "domain": [row.skill for row in rows],
    }
