"""The promise checked end to end: move every held matrix inside its null space, and see that outputs stay.

A basis protects what hooks saw enter a layer. Whether that is what the layer's weight acts on is decided here, by the
function itself: on a few rows of calibration text, each held matrix gets a random update D whose rows lie in the
null space and are orthogonal to all inputs that were seen, so D x = 0 for every one of them. (Where those inputs fill a
small null space, D is orthogonal to them alone: what is asked is the same.) The plain forward must then give what it
gave before, at every position that counts. It does not where a weight is used without its module being called, a module
changes its input, an input is changed in place between two readers, an adapter reads another's output, a mask does not
line up with the rows, or text reaches a layer at positions that calibration never ran.

Everything is put back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.hold import replaced
from nspo_lightning.callbacks.null_space.inference import inference, plain_outputs, ready
from nspo_lightning.callbacks.null_space.text_sample import halved
from nspo_lightning.nullspace import Basis, Calibration, ForwardCall, ProtectedLayer
from nspo_lightning.nullspace.collect import InputCollector
from nspo_lightning.nullspace.projection import apply

TOLERANCE = 1e-4
"""Largest change of an output tensor or of one of its channels, relative, in float32; rounding gives 1e-7 to 1e-5."""
HALF_TOLERANCE = 2e-2
"""The same where weights are in 16 bits: rounding that flips gives 1e-3 to 5e-3."""
_STEP = 0.1  # size of a move, relative to the layer's own outputs; larger ones let rounding grow from layer to layer
_SMALLER = 0.1  # a move that outputs follow is repeated at this size: a fault shrinks with it, rounding is gone
_EXACT_WIDTH = 4096  # up to it directions are found in float64
_NOTHING = 1e-6  # share of a row in the null space that is rounding
_LEAST_ROOM = 1e-2  # share of a random row's norm that must be left for its direction not to be rounding noise
_QUIET = 1e-2  # a channel is measured against this share of the mean one at least
_MANY = 4  # inputs a direction from which a call is cut before directions are looked for


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the check found.

    Attributes:
        change: Largest change of outputs, relative, over the rows that were run.
        layers: Held layers that were moved.
        without_room: Held layers that could not be moved: the rows' inputs fill their null space.
        calls: Forward calls that were checked.
    """

    change: float
    layers: int
    without_room: tuple[str, ...]
    calls: int


_Updates = dict[str, tuple[Tensor, Tensor | None]]
"""Layer -> (rows of A and B of an adapter, or rows of D and None)."""


class EndToEndCheck:
    """Runs the check; one for each start of a fit.

    Args:
        trainer: For its precision.
        pl_module: The module, on its device.
        layers: What is held.
        calibration: The bases.
        collect: The forward that calibration ran.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
        calibration: Calibration,
        collect: Callable[..., Any],
    ) -> None:
        self._trainer, self._module = trainer, pl_module
        self._layers = tuple(layers)
        self._energy = calibration.output_energy
        self._groups = calibration.groups
        self._leader = calibration.leaders()
        bases = calibration.bases
        self._bases = {layer.name: bases[self._leader[layer.name]].to(layer.matrix.device) for layer in layers}
        self._collect = collect
        self._generator = torch.Generator().manual_seed(0)

    def run(self, calls: Sequence[ForwardCall]) -> Verification:
        """Check some calibration text; modes and weights are left as they were found.

        Args:
            calls: See `TextSample.rows`; the same on all ranks.

        Returns:
            What was found.

        Raises:
            MisconfigurationException: Naming the layer whose move changes outputs.
        """
        largest, moved, stuck = 0.0, set[str](), set[str]()
        for call in calls:
            with inference(self._trainer, self._module, exact=True):
                on_device = ready(call, self._trainer, self._module)
                on_device, updates = self._with_room(on_device)
                before = plain_outputs(on_device, self._module)
                with self._moved(updates):
                    change = self._change(before, on_device)
                if ranks.any_rank(self._is_fault(change, before, on_device, updates)):
                    raise MisconfigurationException(self._blame(before, on_device, updates, change))
            largest = max(largest, change)
            moved |= updates.keys()
            stuck |= {layer.name for layer in self._layers} - updates.keys()
        return Verification(
            change=largest, layers=len(moved), without_room=tuple(sorted(stuck - moved)), calls=len(calls)
        )

    # ------------------------------------------------------------------ one call

    def _with_room(self, call: ForwardCall) -> tuple[ForwardCall, _Updates]:
        """Return a call, cut until its inputs leave each layer a direction (or it can't be cut), and the moves."""
        while True:
            seen, shorter = self._seen(call), halved(call)
            crowded = any(len(rows) > _MANY * rows.shape[1] for rows in seen.values())
            if shorter is None or not crowded:
                updates = self._updates(seen)
                if shorter is None or len(updates) == len(self._layers):
                    return call, updates
            call = shorter

    def _is_fault(self, change: float, before: list[Tensor], call: ForwardCall, updates: _Updates) -> bool:
        """Return whether outputs follow a move: rounding does not, once the move is small."""
        limit = self._tolerance()
        if not change > limit:  # a change that is not a number is looked at too
            return change != change
        with self._moved(updates, _SMALLER):
            return not self._change(before, call) <= _SMALLER * limit

    def _change(self, before: list[Tensor], call: ForwardCall) -> float:
        after = plain_outputs(call, self._module)
        if [y.shape for y in after] != [y.shape for y in before]:
            return math.inf
        return max((relative_change(a, b) for a, b in zip(after, before, strict=True)), default=0.0)

    def _tolerance(self) -> float:
        tensors = (*self._module.parameters(), *self._module.buffers())
        half = any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
        return HALF_TOLERANCE if half else TOLERANCE

    def _seen(self, call: ForwardCall) -> dict[str, Tensor]:
        """Return the rows that enter each group of layers, as calibration collects them."""
        modules = {layer.name: layer.module for layer in self._layers}
        collector: InputCollector[Rows] = InputCollector(
            modules, groups=self._groups, new_sum=lambda _, width: Rows(width)
        )
        with collector:
            collector.begin(call.mask, call.domains)
            self._collect(*call.args, **call.kwargs)
            collector.end()
        return {
            first: torch.cat([rows for kept in sums.values() for rows in kept.seen])
            for first, sums in collector.moments.items()
        }

    def _updates(self, seen: Mapping[str, Tensor]) -> _Updates:
        """Return a random move for each layer that has room: (rows of A or D, B or None). What was not seen stays."""
        updates: _Updates = {}
        taken: dict[str, tuple[Tensor, Tensor | None]] = {}
        for layer in self._layers:
            basis, first = self._bases[layer.name], self._leader[layer.name]
            if first not in seen:
                continue
            local = layer.rows(ranks.local_part(layer.matrix.detach()))
            start = torch.randn(local.shape, generator=self._generator).to(local.device)
            if basis.width <= _EXACT_WIDTH and start.device.type != "mps":
                start = start.double()
            if first not in taken:
                inputs = seen[first].to(start.dtype)
                inside = null_directions(basis, inputs)
                filled = basis.form == "hard" and len(inside) >= basis.null_dims
                taken[first] = inside, null_directions(None, inputs) if filled else None
            inside, everywhere = taken[first]
            rows = null_rows(basis, start, inside) if everywhere is None else null_rows(None, start, everywhere)
            if rows is not None:
                updates[layer.name] = self._sized(layer, rows)
        return updates

    def _sized(self, layer: ProtectedLayer, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return unit rows as a move of `_STEP` times the layer's own size: its outputs' energy by its inputs'."""
        basis = self._bases[layer.name]
        out = layer.matrix.shape[-2] if layer.output is None else layer.output.shape[0]
        ratio = self._energy.get(layer.name, 0.0) / max(basis.energy, 1e-300)
        size = _STEP * ((ratio * basis.width / max(out, 1)) ** 0.5 if 0 < ratio < math.inf else 1.0)
        if layer.output is None or not layer.output.requires_grad:  # a displacement is held, not A itself
            return rows * size, None
        up = ranks.local_part(layer.output.detach())
        drawn = torch.randn(up.shape, generator=self._generator).to(device=up.device, dtype=up.dtype)
        return rows, drawn * size / (max(layer.scale, 1e-12) * max(rows.shape[0], 1) ** 0.5)

    def _moved(self, updates: _Updates, size: float = 1.0) -> AbstractContextManager[None]:
        """Put moves on some layers for a while."""
        values: list[tuple[Tensor, Tensor]] = []
        for layer in self._layers:
            if layer.name in updates:
                rows, up = updates[layer.name]
                matrix = layer.rows(ranks.local_part(layer.matrix.detach()))
                values.append((matrix, rows if up is not None else matrix + size * rows))
                if up is not None and layer.output is not None:
                    values.append((ranks.local_part(layer.output.detach()), size * up))
        return replaced(values)

    # ------------------------------------------------------------------ who it was

    def _blame(self, before: list[Tensor], call: ForwardCall, updates: _Updates, change: float) -> str:
        names = [layer.name for layer in self._layers if layer.name in updates]
        while len(names) > 1:
            half = names[: len(names) // 2]
            part = {name: updates[name] for name in half}
            with self._moved(part):
                alone = self._change(before, call)
            fault = ranks.any_rank(self._is_fault(alone, before, call, part))
            names = half if fault else names[len(names) // 2 :]
        return (
            f"The null space does not hold: outputs on calibration text move by {change:.2g} (relative) when weights "
            f"are moved inside it, and '{names[0]}' is a layer that does it. What was seen to enter it is not what its "
            "weight acts on. Likely causes: the weight is used without calling its module (functional use, "
            "`torch.nn.MultiheadAttention`); the module changes its input before using it; its input is changed in "
            "place after another layer has read it; it reads what another adapter made; the mask does not line up "
            "with its rows (routed or transposed tokens); calibration ran it at fewer positions than the model does. "
            "Freeze it or leave it out (`requires_grad_(False)`, `target_modules`), or mend the module. "
            "`verify: false` trains without this check."
        )


class Rows:
    """Keeps the rows themselves, in the place of a second moment."""

    def __init__(self, width: int) -> None:
        self.width, self.rows = width, 0
        self.seen: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``."""
        self.rows += len(rows)
        self.seen.append(rows.float())

    def all_reduce(self) -> None:
        """Keep this rank's own: all ranks run the same rows."""


def relative_change(after: Tensor, before: Tensor) -> float:
    """Return ||y' - y|| / ||y|| of a tensor, or of that of its channels (last dimension) where it is largest.

    Example:
        >>> y = torch.tensor([[1e5, 1.0], [1e5, 1.0]])
        >>> relative_change(y + torch.tensor([0.0, 1.0]), y) > 1e-4  # not hidden by the large channel
        True
    """
    if not before.numel():
        return 0.0
    tiny = torch.finfo(before.dtype).tiny
    far, size = after - before, torch.linalg.vector_norm(before)
    whole = torch.linalg.vector_norm(far) / size.clamp_min(tiny)
    if before.ndim < 2:
        return float(whole)
    channels = torch.linalg.vector_norm(before.flatten(0, -2), dim=0)
    least = _QUIET * size / before.shape[-1] ** 0.5
    each = torch.linalg.vector_norm(far.flatten(0, -2), dim=0) / channels.clamp_min(float(least)).clamp_min(tiny)
    return float(torch.maximum(whole, each.max()))


def null_directions(basis: Basis | None, seen: Tensor) -> Tensor:
    """Return an orthonormal basis of what inputs have in the null space.

    Args:
        basis: Of the layer's inputs; None = everything is null, as it is in the soft form.
        seen: Inputs, shape ``(n, width)``.

    Returns:
        Rows, shape ``(m, width)``.
    """
    if not seen.numel():
        return seen.new_zeros(0, seen.shape[1])
    rest = _inside(basis, _unit(seen))  # a row counts by its direction: massive ones must not hide the others
    if len(rest) <= rest.shape[1]:
        _, strength, directions = torch.linalg.svd(rest, full_matrices=False)
        return cast(Tensor, directions[strength > _NOTHING])
    values, vectors = torch.linalg.eigh(rest.T @ rest)
    return cast(Tensor, vectors.T[values > max(_NOTHING**2, 1e-15) * len(rest)])


def null_rows(basis: Basis | None, start: Tensor, taken: Tensor) -> Tensor | None:
    """Turn random rows into unit rows in the null space that are orthogonal to inputs.

    Args:
        basis: Of the layer's inputs; None = everything is null.
        start: Shape ``(r, width)``.
        taken: See `null_directions`.

    Returns:
        Shape ``(r, width)``, float32, rows of norm 1; None where there is no direction left.
    """
    rows = _inside(basis, start)
    for _ in range(2):
        rows = _inside(basis, rows - (rows @ taken.T) @ taken)
    if float(torch.linalg.vector_norm(rows)) <= _LEAST_ROOM * float(torch.linalg.vector_norm(start)):
        return None
    return _unit(rows).to(torch.float32)


def _inside(basis: Basis | None, rows: Tensor) -> Tensor:
    return apply(basis, apply(basis, rows)) if basis is not None and basis.form == "hard" else rows


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return unit
