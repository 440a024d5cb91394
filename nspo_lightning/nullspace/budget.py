"""How much memory a calibration takes, and which inputs it reads in which pass over the text: plain arithmetic.

Sums and sketches are held where the inputs are: on the GPU, if that is where the model runs. What does not fit there
waits for another pass, and a single input that does not fit is sketched; nothing moves to the host, since a pass over
the text costs less than moving sums of this size after each product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nspo_lightning.nullspace.basis import working_dtype
from nspo_lightning.nullspace.covariance import FLOAT64_SUM_WIDTH, fold_rows

_DEVICE_SHARE = 0.6  # of the free memory of a GPU; the forward passes need the rest
_MAX_COLUMNS = 4096
_LEAST_COLUMNS = 16
_WEIGHED, _WEIGHED_ANEW = 9, 3  # square matrices of an input's width


def device_budget(free_bytes: float) -> float:
    """Return how much of a GPU's free memory a calibration may take where no budget is given."""
    return _DEVICE_SHARE * free_bytes


def sum_bytes(width: int, domains: int) -> float:
    """Return the size of the running sums of one input."""
    return (8.0 if width <= FLOAT64_SUM_WIDTH else 4.0) * width * width * domains


def collecting_bytes(width: int, domains: int) -> float:
    """Return what one input holds while text is read: its sums, and rows that wait for a product."""
    return sum_bytes(width, domains) + 4.0 * fold_rows(width) * width


def fold_bytes(width: int) -> float:
    """Return what the fold of one input takes for a moment: the rows in one piece, and a tile of their product."""
    exact = width <= FLOAT64_SUM_WIDTH
    return (12.0 if exact else 4.0) * fold_rows(width) * width + (2.0 * width * width if exact else 0.0)


def decomposition_bytes(width: int, device_type: str) -> float:
    """Return what a full decomposition takes beside the moment: eigenvectors and workspace, a copy in its dtype."""
    dtype = working_dtype(width, device_type)
    copied = dtype == torch.float32 and width <= FLOAT64_SUM_WIDTH
    return (3.0 * dtype.itemsize + (4.0 if copied else 0.0)) * width * width


def weighing_bytes(width: int, limits: int) -> float:
    """Return what `contrast` takes beside an input's sums: C, S, what whitens them, eigenvectors, all in float64.

    Limits on domains take a matrix each, and what their weights are tried with.
    """
    matrices = _WEIGHED + (_WEIGHED_ANEW + limits if limits else 0)
    return matrices * 8.0 * width * width


def peak_bytes(widths: Sequence[int], domains: int, device_type: str, *, limits: int | None = None) -> float:
    """Return the most that a pass over these inputs takes, while text is read or while sums are decomposed.

    Args:
        widths: Width of each input, in features.
        domains: Sums for each input.
        device_type: Where the sums are.
        limits: Domains with limits under `contrast`, which looks at each domain's sum once more when it has chosen
            directions; None = another criterion.
    """
    if not widths:
        return 0.0
    reading = sum(collecting_bytes(w, domains) for w in widths) + max(fold_bytes(w) for w in widths)
    if limits is not None:
        return max(reading, sum(sum_bytes(w, domains) for w in widths) + max(weighing_bytes(w, limits) for w in widths))
    # An input's domains are united, in the memory of one of them, before it is decomposed.
    more = max(decomposition_bytes(w, device_type) - sum_bytes(w, domains - 1) for w in widths)
    return max(reading, sum(sum_bytes(w, domains) for w in widths) + max(more, 0.0))


def plan_passes(
    widths: Mapping[str, int], domains: int, budget: float, device_type: str, *, limits: int | None = None
) -> tuple[list[list[str]], list[str]]:
    """Spread inputs over as few passes as a simple rule finds: the widest first, each where there is room.

    Args:
        widths: Input -> features.
        domains: Sums for each input.
        budget: Bytes that a pass may take.
        device_type: Where the sums are.
        limits: See `peak_bytes`.

    Returns:
        Inputs of each pass, in the order given; and those that no pass has room for.
    """
    passes: list[list[str]] = []

    def peak(names: Sequence[str]) -> float:
        return peak_bytes([widths[n] for n in names], domains, device_type, limits=limits)

    too_wide = [name for name in widths if peak([name]) > budget]
    for name in sorted(set(widths) - set(too_wide), key=lambda n: (-widths[n], list(widths).index(n))):
        for members in passes:
            if peak((*members, name)) <= budget:
                members.append(name)
                break
        else:
            passes.append([name])
    return [[name for name in widths if name in set(members)] for members in passes], too_wide


def sketch_bytes(width: int, columns: int, domains: int, inputs: int = 1) -> float:
    """Return what sketches of equal inputs take: Q, an image a domain, and the workspace of one QR decomposition."""
    return 4.0 * width * columns * ((1 + domains) * inputs + 3)


def sketch_columns(width: int, budget_bytes: float, domains: int = 1) -> int:
    """Return how many sketch columns of one input fit into a budget.

    Raises:
        ValueError: If fewer than 16 fit.
    """
    one = sketch_bytes(width, 1, domains)
    columns = int(min(budget_bytes / one, width, _MAX_COLUMNS))
    if columns < _LEAST_COLUMNS:
        raise ValueError(
            f"A memory budget of {budget_bytes / 1e9:.3g} GB holds only {columns} sketch columns for an input of width "
            f"{width}; at least {_LEAST_COLUMNS} are needed. Raise `memory_budget_gb` to "
            f"{_LEAST_COLUMNS * one / 1e9:.3g} or more."
        )
    return columns


def sketched_together(widths: Mapping[str, int], domains: int, budget: float) -> list[str]:
    """Return the first input of several to be sketched, and those of its width that fit beside it."""
    first = next(iter(widths))
    columns = sketch_columns(widths[first], budget, domains)
    alike = [name for name, width in widths.items() if width == widths[first]]
    fits = [n for n in range(1, len(alike) + 1) if sketch_bytes(widths[first], columns, domains, n) <= budget]
    return alike[: max(fits, default=1)]
