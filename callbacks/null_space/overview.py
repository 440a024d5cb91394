"""A calibration in a few lines of 80 columns: a row for each kind of input, over all layers that have it."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.diagnostics import table_rows
from nspo_lightning.nullspace.record import by_kind
from nspo_lightning.terminal import percent

DETAILS = ".layers.csv"
"""Ending of the file with a row for each input."""


def overview_rows(calibration: Calibration) -> list[dict[str, str]]:
    """Return one row for each kind of input and width, heading -> cell: which layers, how much of them is free."""
    rows = []
    for kind, inputs in by_kind(calibration).items():
        for width in sorted({basis.width for _, basis in inputs}):
            own = [(depth, basis) for depth, basis in inputs if basis.width == width]
            rows.append({
                "input of": _short(kind),
                "layers": _span([depth for depth, _ in own]),
                "width": str(width),
                "free": _range([basis.null_dims / basis.width for _, basis in own], percent) + " %",
                "energy left": _range([basis.choice.energy_left for _, basis in own], "{:.2g}".format),
            })
    return rows


def promise_rows(calibration: Calibration) -> list[dict[str, str]]:
    """Return one row for each domain, heading -> cell: the harm that ``contrast`` promises there, and its limit."""
    return [
        {
            "domain": domain,
            "promised": f"{promise.harm:.2g}",
            "limit": "" if promise.limit is None else f"{promise.limit:.2g}",
            "weight for it": f"{promise.weight:.2g}" if promise.weight else "",
        }
        for domain, promise in sorted(calibration.promises.items())
    ]


def remarks(calibration: Calibration) -> list[str]:
    """Return what is special about some inputs, with their number: held by a limit, or known from few tokens."""
    bases = list(calibration.bases.values())
    counts = Counter(remark for basis in bases for remark in _remarks(basis))
    return [f"{count} of {len(bases)} inputs: {remark}" for remark, count in counts.most_common()]


def write_details(calibration: Calibration, path: Path) -> None:
    """Write a CSV file with a row for each distinct input."""
    rows = table_rows(calibration)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["layer"])
        writer.writeheader()
        writer.writerows(rows)


def _remarks(basis: Basis) -> list[str]:
    found = re.findall(r"(?:, |; | \()((?:held by|one direction left|flat)[^,;)]*)", basis.choice.reason)
    if basis.choice.reason.startswith("its inputs are all zero"):
        found.append(basis.choice.reason)
    if basis.choice.spare:
        found.append(basis.choice.reason)
    few = basis.tokens < basis.width
    return found + (["fewer tokens of text than the input is wide; give more (`data.calibration_size`)"] if few else [])


def _short(kind: str) -> str:
    """Write what names in braces end in only once: ``{q_proj,k_proj}`` as ``{q,k}_proj``."""
    found = re.fullmatch(r"(.*)\{([^{}]*)\}(.*)", kind)
    if found is None:
        return kind
    names = found[2].split(",")
    ends = {name.partition("_")[2] for name in names}
    end = f"_{ends.pop()}" if len(ends) == 1 and ends != {""} else ""
    return f"{found[1]}{{{','.join(name.removesuffix(end) for name in names)}}}{end}{found[3]}"


def _span(depths: Sequence[int]) -> str:
    first, last = min(depths), max(depths)
    if len(depths) == 1:
        return str(first)
    whole = len(depths) == last - first + 1
    return f"{first} to {last}" if whole else f"{len(depths)} of {first} to {last}"


def _range(values: Sequence[float], say: Callable[[float], str]) -> str:
    ends = [say(value) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
