"""How much is free, and where, at sight: kinds of input in rows, layers in columns, a colour for each input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from nspo_lightning.callbacks.null_space.map_labels import colour_end, power, short_kind
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.record import places
from nspo_lightning.terminal import percent

_WRITTEN = 16  # so many layers have room for numbers in their cells
_LEAST_HARM = 1e-12


def free_figure(calibration: Calibration) -> Any:
    """Return a matplotlib figure that belongs to no window: free share and predicted harm of each input."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    where = places(calibration)
    kinds = list(dict.fromkeys(kind for kind, _ in where.values()))
    depths = sorted({depth for _, depth in where.values() if depth is not None}) or [0]
    free = _grid(kinds, depths)
    harm = _grid(kinds, depths)
    for first, (kind, depth) in where.items():
        basis = calibration.bases[first]
        row, column = kinds.index(kind), 0 if depth is None else depths.index(depth)
        free[row][column] = basis.null_dims / basis.width
        harm[row][column] = min(max(basis.choice.gain, _LEAST_HARM), 1.0)
    size = min(2.2 + max(0.3 * len(depths), 4.2), 14), min(2.4 + 0.7 * max(len(kinds), 2), 16)
    figure = Figure(figsize=size, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    shares = [value for row in free for value in row if not math.isnan(value)]
    end = colour_end(shares)
    drawn = [[100 * value for value in row] for row in free]
    _draw(upper, drawn, kinds, depths, Normalize(0, 100 * end), "viridis", lambda value: percent(value / 100))
    harms = [value for row in harm for value in row if not math.isnan(value)]
    scale = LogNorm(min(min(harms), max(harms) / 10), max(harms))
    _draw(lower, harm, kinds, depths, scale, "magma_r", power)
    ends = f"{percent(min(shares))} to {percent(max(shares))} %"
    figure.suptitle(f"{percent(fmean(shares))} % of the directions are free ({ends})", fontsize=15)
    scaled = "" if end == 1 else f" (colours to {percent(end)} %)"
    upper.set_title(f"free directions, % of the width{scaled}", fontsize=13, loc="left")
    lower.set_title("predicted harm, squared (1: unprojected)", fontsize=13, loc="left")
    lower.set_xlabel("layer", fontsize=13)
    return figure


def _grid(kinds: Sequence[str], depths: Sequence[int]) -> list[list[float]]:
    return [[math.nan] * len(depths) for _ in kinds]


def _draw(
    axes: Any,
    values: list[list[float]],
    kinds: Sequence[str],
    depths: Sequence[int],
    scale: Any,
    colours: str,
    text: Callable[[float], str],
) -> None:
    image = axes.imshow(values, aspect="auto", norm=scale, cmap=colours, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), [short_kind(kind) for kind in kinds], fontsize=13)
    step = max(1, -(-len(depths) // 20))
    axes.set_xticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]], fontsize=12)
    if len(depths) > _WRITTEN:
        axes.figure.colorbar(image, ax=axes, pad=0.01)
        return
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(scale(value))
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
                colour = "black" if light else "white"
                axes.text(column, row, text(value), ha="center", va="center", fontsize=12, color=colour)
