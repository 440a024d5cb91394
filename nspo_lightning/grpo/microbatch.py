"""Cut a rollout into micro-batches by token budget: memory is set once, whatever lengths come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nspo_lightning.grpo.batch import Rollout, TokenCounts


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rows of a rollout, trimmed of padding.

    Attributes:
        rollout: Whole groups, or part of one group.
        rows: Shape (r,), int64, the rows' indices in the rollout that was cut, on its device: slice advantages,
            weights, old and reference log-probabilities with them, and their columns with ``[:, : rollout C]``.
        counts: Numbers of its tokens.
    """

    rollout: Rollout
    rows: Tensor
    counts: TokenCounts

    def take(self, values: Tensor) -> Tensor:
        """Slice a tensor of the whole rollout, (R,) or (R, C), to (r,) or (r, c) with its own length c."""
        picked = values[self.rows.to(values.device)]
        return picked if picked.ndim == 1 else picked[:, : self.rollout.completion_ids.shape[1]]


def split_microbatches(
    rollout: Rollout, tokens_per_microbatch: int | None, *, share_prefix: bool = True
) -> list[MicroBatch]:
    """Cut a rollout such that no micro-batch costs more tokens than the budget.

    With shared prompts a micro-batch costs its prompts once and its completions' real tokens; without, each row costs
    the longest prompt and the longest completion of the micro-batch. Groups of similar length go together. A group
    over the budget is cut into parts, each of which pays the prompt again; a single completion over the budget is
    still a micro-batch of its own.

    Args:
        rollout: P groups.
        tokens_per_microbatch: The budget; None = everything at once.
        share_prefix: Whether the micro-batches will be scored with shared prompts.

    Returns:
        Micro-batches that together hold every row exactly once. All that is asked of the device is asked here, so that
        none of them waits for it.

    Raises:
        ValueError: If the budget is not positive.
    """
    if tokens_per_microbatch is not None and tokens_per_microbatch < 1:
        raise ValueError(f"`tokens_per_microbatch` must be at least 1 or None, got {tokens_per_microbatch}.")
    budget = 2**62 if tokens_per_microbatch is None else tokens_per_microbatch
    cost = _packed_tokens if share_prefix else _padded_tokens
    masks = rollout.prompt_mask.cpu(), rollout.completion_mask.cpu()
    prompts: list[int] = masks[0].sum(1).tolist()
    lengths: list[list[int]] = masks[1].sum(1).view(-1, rollout.group_size).tolist()
    batches: list[MicroBatch] = []
    together: list[int] = []

    def total(groups: list[int]) -> int:
        return cost([prompts[g] for g in groups], [length for g in groups for length in lengths[g]])

    def close() -> None:
        if together:
            batches.append(_whole_groups(rollout, masks, together))
            together.clear()

    for p in sorted(range(len(prompts)), key=lambda p: -max(lengths[p])):
        if total([p]) > budget:
            parts = _cut(lengths[p], partial(cost, [prompts[p]]), budget)
            batches += [_part_of_group(rollout, masks, p, part) for part in parts]
            continue
        if total([*together, p]) > budget:
            close()
        together.append(p)
    close()
    return batches


def _packed_tokens(prompts: list[int], completions: list[int]) -> int:
    return sum(prompts) + sum(completions)


def _padded_tokens(prompts: list[int], completions: list[int]) -> int:
    return len(completions) * (max(prompts) + max(completions))


def _cut(lengths: list[int], cost: Callable[[list[int]], int], budget: int) -> list[list[int]]:
    # Cuts a group's completions, longest first so that parts pad little, into as few parts as fit the budget.
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts and cost([lengths[r] for r in [*parts[-1], row]]) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _whole_groups(rollout: Rollout, masks: tuple[Tensor, Tensor], groups: list[int]) -> MicroBatch:
    size = rollout.group_size
    rows = (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()
    return _micro_batch(rollout.select(groups), masks[0][groups], masks[1][rows], rows)


def _part_of_group(rollout: Rollout, masks: tuple[Tensor, Tensor], group: int, members: list[int]) -> MicroBatch:
    rows = torch.tensor(sorted(members)) + group * rollout.group_size
    part = rollout.select_rows(group, rows.to(rollout.completion_ids.device))
    return _micro_batch(part, masks[0][[group]], masks[1][rows], rows)


def _micro_batch(part: Rollout, prompt_mask: Tensor, completion_mask: Tensor, rows: Tensor) -> MicroBatch:
    # The masks are the part's own, on the CPU.
    return MicroBatch(
        rollout=part.trim(prompt_mask, completion_mask),
        rows=rows.to(part.completion_ids.device),
        counts=TokenCounts.of(prompt_mask, completion_mask),
    )
