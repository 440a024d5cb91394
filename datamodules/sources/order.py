"""Which rows an epoch visits, in which order, and on which rank: pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from nspo_lightning.terminal import counted

Stop = Literal["shortest", "longest"]
"""When an epoch of several sources ends: before the first repeats a row, or when every source was seen whole."""


def _permutation(size: int, *seeds: int) -> list[int]:
    generator = torch.Generator()
    state = 0
    for seed in seeds:  # a mixing step, so that (1, 2) and (2, 1) differ
        state = (state * 6364136223846793005 + seed + 1442695040888963407) % 2**63
    generator.manual_seed(state)
    return torch.randperm(size, generator=generator).tolist()


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers in proportion to positive weights, by largest remainders."""
    exact = [weight / sum(weights) * total for weight in weights]
    whole = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def mixture_sizes(sizes: Sequence[int], weights: Sequence[float], stop: Stop) -> list[int]:
    """Decide how many rows of each source an epoch visits, at least one each; `longest` repeats smaller sources."""
    choose = min if stop == "shortest" else max
    unit = choose(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(1, round(unit * weight)) for weight in weights]


def epoch_order(
    sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int, stop: Stop = "shortest"
) -> list[int]:
    """Return the rows of a shuffled epoch, as indices into the concatenated sources.

    Each source is an endless chain of its own permutations, and an epoch takes the next piece of each: over epochs
    every row of a source is visited equally often, whatever the weights. `sizes` are the rows of each source.
    """
    order: list[int] = []
    offset = 0
    for source, (size, take) in enumerate(zip(sizes, mixture_sizes(sizes, weights, stop), strict=True)):
        permutations: dict[int, list[int]] = {}
        for position in range(epoch * take, (epoch + 1) * take):
            cycle = position // size
            if cycle not in permutations:
                permutations[cycle] = _permutation(size, seed, source, cycle)
            order.append(offset + permutations[cycle][position % size])
        offset += size
    mixed = _permutation(len(order), seed, -1, epoch)
    return [order[i] for i in mixed]


def rank_batches(order: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's batches of an epoch.

    Every row lands on exactly one rank, and all ranks have equally many batches. The last batch of a rank may be
    smaller; when fewer rows than ranks remain for it, they make some of the last full batches one row larger.

    Raises:
        ValueError: If there are fewer rows than ranks.
    """
    if 0 < len(order) < world_size:
        raise ValueError(
            f"{counted(len(order), 'row')} cannot feed {world_size} ranks. Use fewer devices or more rows."
        )
    step = batch_size * world_size
    full, rest = divmod(len(order), step)
    batches = [list(order[i * step + rank : (i + 1) * step : world_size]) for i in range(full)]
    tail = list(order[full * step :])
    if rest >= world_size:
        batches.append(tail[rank::world_size])
    elif rest and rank < rest:
        batches[-1].append(tail[rank])
    return batches


def repeated_index(position: int, repeat: int, window: int) -> int:
    """Return which batch comes at a position of an epoch that gives each batch `repeat` times.

    Batches come in blocks of `window`, and a block is repeated whole: with a window of two A B A B C D C D.
    """
    block, within = divmod(position, repeat * window)
    return block * window + within % window


def batch_count(rows: int, batch_size: int, world_size: int) -> int:
    """Count the batches that `rank_batches` gives each rank."""
    full, rest = divmod(rows, batch_size * world_size)
    return full + (rest >= world_size)
