"""The spectrum as a picture: energy by direction for each distinct input, and where it is cut.

One panel for each kind of input (q/k/v, o, gate/up, down ...), one line for each layer of that kind. Layers run from
dark to light (viridis, which keeps its order for every kind of colour vision) and, where they are few, differ by their
dashes too.
"""

from __future__ import annotations

from typing import Any

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.record import by_kind

_FEW = 6  # so many layers can be named one by one; more are read off a colour bar
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_LIGHTEST = 0.88  # of the colour map: the rest is too pale on white
_FLOOR = 1e-16  # what is drawn for an energy of zero


def spectrum_figure(calibration: Calibration) -> Any:
    """Return the spectra of a calibration as a matplotlib figure that belongs to no window (nothing needs closing)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = by_kind(calibration)
    depths = sorted({depth for lines in panels.values() for depth, _ in lines})
    few = len(depths) <= _FEW
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns + 1.0, 3.4 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = colormaps["viridis"]
    for axes, (kind, lines) in zip(grid.flat, panels.items(), strict=False):
        for depth, basis in lines:
            place = depths.index(depth)
            colour = colours(_LIGHTEST * place / max(len(depths) - 1, 1))
            _draw(axes, basis, colour, _DASHES[place] if few else "-")
        axes.set_title(f"{kind} ({lines[0][1].width} wide)", fontsize=13)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=11)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    _explain_depth(figure, grid, depths, few)
    figure.suptitle("Energy of layer inputs", fontsize=15)
    figure.supxlabel("direction, as a share of the layer's width (dots: the last protected one)", fontsize=12)
    figure.supylabel("energy relative to the largest", fontsize=12)
    return figure


def _draw(axes: Any, basis: Basis, colour: Any, dashes: Any) -> None:
    values = (basis.values / basis.values[0].clamp_min(1e-300)).clamp_min(_FLOOR).tolist()
    share = [(i + 1) / basis.width for i in range(basis.width)]
    axes.plot(share, values, lw=1.8, color=colour, linestyle=dashes)
    cut = basis.protected
    if 0 < cut < basis.width:
        axes.plot([share[cut - 1]], [values[cut - 1]], "o", ms=7, color=colour, markeredgecolor="black")


def _explain_depth(figure: Any, grid: Any, depths: list[int], few: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.lines import Line2D

    if len(depths) == 1:
        return
    colours = [colormaps["viridis"](_LIGHTEST * i / (len(depths) - 1)) for i in range(len(depths))]
    if few:
        handles = [Line2D([], [], color=c, linestyle=d, lw=1.8) for c, d in zip(colours, _DASHES, strict=False)]
        figure.legend(
            handles, [f"layer {depth}" for depth in depths], loc="outside right upper", fontsize=12, handlelength=3
        )
        return
    scale = LinearSegmentedColormap.from_list("depth", colours)
    mappable = ScalarMappable(Normalize(depths[0], depths[-1]), scale)
    figure.colorbar(mappable, ax=grid, pad=0.01).set_label("layer", fontsize=12)
