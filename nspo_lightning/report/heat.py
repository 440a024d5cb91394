"""The null space as a map, a row a layer and a column a kind of input: the share that is free, and what it risks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nspo_lightning.callbacks.null_space.map_labels import colour_end, power, short_kind
from nspo_lightning.report.records import LayerInput, NullSpace
from nspo_lightning.terminal import percent

_SMALL = 1e-12


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One input: what is written, how strong its colour is (0 to 1), and what a pointer over it reads."""

    text: str
    strength: float
    title: str


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A map; a cell is None where there is no such input."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def heat_maps(null_space: NullSpace) -> list[HeatMap]:
    """Return the map of the free share and, where it is known, that of the predicted harm."""
    inputs = null_space.inputs
    if not inputs:
        return []
    end = colour_end([i.free_share for i in inputs])
    free = _map(
        inputs,
        "Free directions",
        "share of the width, in %" + ("" if end == 1 else f"; colours go to {percent(end)}"),
        [(percent(i.free_share), i.free_share / end, f"{i.free:,} of {i.width:,} directions are free") for i in inputs],
    )
    harms = [i.harm for i in inputs]
    if any(harm is None for harm in harms):
        return [free]
    logs = [math.log10(max(harm, _SMALL)) for harm in harms if harm is not None]
    low, high = min(logs), max(logs)
    span = max(high - low, 1.0)
    harm = _map(
        inputs,
        "Predicted harm",
        "squared change of general outputs, 1 = as without projection",
        [
            (_harm(i.harm or 0.0), (log - low) / span, f"{i.energy_left:.2g} of general text's energy is free")
            for i, log in zip(inputs, logs, strict=True)
        ],
    )
    return [free, harm]


def _map(inputs: Sequence[LayerInput], title: str, note: str, cells: Sequence[tuple[str, float, str]]) -> HeatMap:
    kinds = tuple(dict.fromkeys(i.kind for i in inputs))
    depths = sorted({i.depth for i in inputs}, key=lambda depth: (depth is None, depth or 0))
    by_place = {
        (i.depth, i.kind): Cell(text=text, strength=min(max(strength, 0.0), 1.0), title=_where(i, said))
        for i, (text, strength, said) in zip(inputs, cells, strict=True)
    }
    rows = tuple(
        ("" if depth is None else str(depth), tuple(by_place.get((depth, kind)) for kind in kinds)) for depth in depths
    )
    return HeatMap(title=title, note=note, columns=tuple(map(short_kind, kinds)), rows=rows)


def _where(layer: LayerInput, said: str) -> str:
    place = layer.kind if layer.depth is None else f"layer {layer.depth}, {layer.kind}"
    return f"{place}: {said}"


def _harm(value: float) -> str:
    return "0" if value <= _SMALL else power(value)
