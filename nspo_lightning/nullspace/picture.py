"""The spectrum as a picture: energy by direction for each distinct input, and where it is cut."""

from __future__ import annotations

import math
from typing import Any

from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.diagnostics import common_parent, joint_name

_CURVES = 12  # more than this many lines cannot be told apart; the others are drawn faintly


def spectrum_figure(calibration: Calibration, title: str = "Energy of layer inputs") -> Any:
    """Draw the spectra of a calibration.

    Args:
        calibration: what to draw.
        title: above the picture.

    Returns:
        A matplotlib figure that belongs to no window (nothing needs closing).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    prefix = common_parent(calibration.layer_names())
    every = max(math.ceil(len(calibration.bases) / _CURVES), 1)
    for index, (first, basis) in enumerate(calibration.bases.items()):
        values = basis.values / basis.values[0].clamp_min(1e-300)
        share = [(i + 1) / basis.width for i in range(basis.width)]
        shown = index % every == 0
        label = joint_name(n.removeprefix(prefix) for n in calibration.groups[first]) if shown else None
        (line,) = axes.plot(
            share, values.clamp_min(1e-16).tolist(), lw=1.2 if shown else 0.5, alpha=0.9 if shown else 0.3, label=label
        )
        cut = basis.protected
        if 0 < cut < basis.width:
            axes.plot([share[cut - 1]], [float(values[cut - 1])], "o", ms=4, color=line.get_color())
    axes.set_yscale("log")
    axes.set_xlabel("direction, as a share of the layer's width (dots: the last protected one)")
    axes.set_ylabel("energy relative to the largest")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
