"""From rows to batches of tensors. Masks: True is a real token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.text.render import ChatRenderer


def pad(ids: Sequence[Sequence[int]], pad_token_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Pad token ids to one length.

    Args:
        ids: The ids of each row.
        pad_token_id: What fills the rest.
        side: Where it fills.

    Returns:
        The ids and the mask (True = real token), both of shape (rows, longest).
    """
    longest = max((len(row) for row in ids), default=0)
    padded = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.bool)
    for i, row in enumerate(ids):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        padded[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return padded, mask


def gather_columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """Collect the rows' columns; a row without one of them holds None there.

    Args:
        rows: The rows.

    Returns:
        One list a column, as long as `rows`.
    """
    columns = [row.all_columns() for row in rows]
    names = dict.fromkeys(name for row in columns for name in row)
    return {name: [row.get(name) for row in columns] for name in names}


def collate_prompts(rows: Sequence[PromptRow], renderer: ChatRenderer) -> dict[str, Any]:
    """Build a batch of prompts for rollouts and evaluation.

    Args:
        rows: The rows.
        renderer: Applies the chat template.

    Returns:
        `prompt` (text or chats), `prompt_ids` and `prompt_mask` of shape (rows, prompt tokens), left-padded,
        and `columns`.
    """
    ids, mask = pad(renderer.encode([renderer.text(row.prompt) for row in rows]), renderer.pad_token_id, "left")
    return {
        "prompt": [row.prompt for row in rows],
        "prompt_ids": ids,
        "prompt_mask": mask,
        "columns": gather_columns(rows),
    }
