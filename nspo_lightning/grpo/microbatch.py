"""Cut a rollout into micro-batches by token budget: memory is set once, whatever lengths come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nspo_lightning.grpo.batch import Rollout


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rows of a rollout, trimmed of padding.

    Attributes:
        rollout: whole groups, or part of one group.
        rows: shape (r,), int64 on the CPU, the rows' indices in the rollout that was cut: slice advantages, weights,
            old and reference log-probabilities with them, and their columns with ``[:, : rollout C]``.
    """

    rollout: Rollout
    rows: Tensor

    def take(self, values: Tensor) -> Tensor:
        """Slice a tensor of the whole rollout.

        Args:
            values: shape (R,) or (R, C).

        Returns:
            Shape (r,) or (r, c) with the micro-batch's own padded length c.
        """
        picked = values[self.rows.to(values.device)]
        return picked if picked.ndim == 1 else picked[:, : self.rollout.completion_ids.shape[1]]


def split_microbatches(rollout: Rollout, tokens_per_microbatch: int | None) -> list[MicroBatch]:
    """Cut a rollout such that no micro-batch costs more tokens than the budget.

    A group costs its prompt once and its completions at their padded length. Groups of similar length go together, so
    that little padding is computed. A group over the budget is cut into parts, each of which pays the prompt again;
    a single completion over the budget still is a micro-batch of its own.

    Args:
        rollout: P groups.
        tokens_per_microbatch: the budget; None = everything at once.

    Returns:
        Micro-batches that hold every row exactly once.

    Raises:
        ValueError: If the budget is not positive.
    """
    if tokens_per_microbatch is not None and tokens_per_microbatch < 1:
        raise ValueError(f"`tokens_per_microbatch` must be at least 1 or None, got {tokens_per_microbatch}.")
    size = rollout.group_size
    lengths = rollout.completion_mask.sum(1).cpu().view(-1, size)
    prompt_lengths = rollout.prompt_mask.sum(1).cpu()
    budget = tokens_per_microbatch
    if budget is None:
        budget = 2**62
    longest = lengths.max(1).values.clamp(min=1)
    batches: list[MicroBatch] = []
    open_groups: list[int] = []
    prompt, completion = 0, 0

    def flush() -> None:
        if open_groups:
            index = torch.tensor(open_groups)
            rows = (index[:, None] * size + torch.arange(size)).flatten()
            batches.append(MicroBatch(rollout=rollout.select(open_groups).trim(), rows=rows))
            open_groups.clear()

    for p in torch.argsort(longest, descending=True, stable=True).tolist():
        if int(prompt_lengths[p]) + size * int(longest[p]) > budget:
            batches += _parts_of_group(rollout, p, lengths[p], int(prompt_lengths[p]), budget)
            continue
        new_prompt = max(prompt, int(prompt_lengths[p])) if open_groups else int(prompt_lengths[p])
        new_completion = max(completion, int(longest[p])) if open_groups else int(longest[p])
        if open_groups and (len(open_groups) + 1) * (new_prompt + size * new_completion) > budget:
            flush()
            new_prompt, new_completion = int(prompt_lengths[p]), int(longest[p])
        open_groups.append(p)
        prompt, completion = new_prompt, new_completion
    flush()
    return batches


def _parts_of_group(rollout: Rollout, p: int, lengths: Tensor, prompt_length: int, budget: int) -> list[MicroBatch]:
    # Longest completions first: every part then pads little.
    order = torch.argsort(lengths, descending=True, stable=True)
    parts: list[MicroBatch] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        count = max(1, min(len(order) - start, (budget - prompt_length) // longest))
        rows = order[start : start + count].sort().values + p * rollout.group_size
        device_rows = rows.to(rollout.completion_ids.device)
        parts.append(MicroBatch(rollout=rollout.select_rows(p, device_rows).trim(), rows=rows))
        start += count
    return parts
