"""The promise checked end to end: move every held matrix inside its null space, and see that outputs stay.

A basis protects what hooks saw enter a layer. Whether that is what the layer's weight acts on is decided here, by the
function itself: on a few rows of calibration text, each held matrix gets a large random update D whose rows lie in the
null space and are orthogonal to all inputs that were seen, so D x = 0 for every one of them. The plain forward must
then give what it gave before, at every position that counts. It does not where a weight is used without its module
being called, a module changes its input, an input is changed in place between two readers, an adapter reads another's
output, a mask does not line up with the rows, or text reaches a layer at positions that calibration never ran.

Everything is put back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import move_call
from nspo_lightning.callbacks.null_space.hold import replaced
from nspo_lightning.callbacks.null_space.inference import inference, plain_outputs
from nspo_lightning.callbacks.null_space.text_sample import halved
from nspo_lightning.nullspace import Basis, Calibration, ForwardCall, ProtectedLayer
from nspo_lightning.nullspace.collect import InputCollector
from nspo_lightning.nullspace.projection import apply

TOLERANCE = 1e-4
"""Largest change of outputs, ||y' - y|| / ||y||, in float32; rounding gives 1e-7 to 1e-6, the faults 1e-2 and more."""
HALF_TOLERANCE = 2e-2
"""The same where weights or activations are in 16 bits: rounding that flips gives 1e-3 to 5e-3."""
_EXACT_WIDTH = 4096  # up to it directions are found in float64
_NOTHING = 1e-6  # share of a row in the null space that is rounding
_LEAST_ROOM = 1e-2  # share of a random row's norm that must be left for its direction not to be rounding noise


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


class EndToEndCheck:
    """Runs the check; one for each start of a fit.

    Args:
        trainer: For its precision.
        pl_module: The module, on its device.
        layers: What is held.
        calibration: The bases.
        collect: The forward that calibration ran; None = the module's own.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
        calibration: Calibration,
        collect: Callable[..., Any] | None = None,
    ) -> None:
        self._trainer, self._module = trainer, pl_module
        self._layers = tuple(layers)
        self._bases = {layer.name: calibration.basis_of(layer.name).to(layer.matrix.device) for layer in layers}
        self._groups = calibration.groups
        self._leader = {name: first for first, names in calibration.groups.items() for name in names}
        self._collect = collect or pl_module
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
            on_device = move_call(call, self._module.device)
            with inference(self._trainer, self._module):
                updates = self._updates(on_device)
                while len(updates) < len(self._layers) and (shorter := halved(on_device)) is not None:
                    on_device = shorter  # fewer inputs leave more directions
                    updates = self._updates(on_device)
                before = plain_outputs(on_device, self._module).clone()
                with self._moved(updates):
                    change = self._change(before, on_device)
                if ranks.any_rank(change > self._tolerance(before)):
                    raise MisconfigurationException(self._blame(before, on_device, updates, change))
            largest = max(largest, change)
            moved |= updates.keys()
            stuck |= {layer.name for layer in self._layers} - updates.keys()
        return Verification(
            change=largest, layers=len(moved), without_room=tuple(sorted(stuck - moved)), calls=len(calls)
        )

    # ------------------------------------------------------------------ one call

    def _change(self, before: Tensor, call: ForwardCall) -> float:
        after = plain_outputs(call, self._module)
        scale = torch.linalg.vector_norm(before).clamp_min(torch.finfo(torch.float32).tiny)
        return float(torch.linalg.vector_norm(after - before) / scale)

    def _tolerance(self, before: Tensor) -> float:
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self._module.parameters())
        half |= any(b.dtype in (torch.float16, torch.bfloat16) for b in self._module.buffers())
        return HALF_TOLERANCE if half or torch.is_autocast_enabled(before.device.type) else TOLERANCE

    def _updates(self, call: ForwardCall) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return a random update for each layer that has room: (new A or D, new B or None)."""
        modules = {layer.name: layer.module for layer in self._layers}
        collector: InputCollector[Rows] = InputCollector(modules, groups=self._groups, new_sum=Rows)
        with collector:
            collector.begin(call.mask, call.domains)
            self._collect(*call.args, **call.kwargs)
            collector.end()
        updates: dict[str, tuple[Tensor, Tensor | None]] = {}
        for layer in self._layers:
            sums = collector.moments.get(self._leader[layer.name], {}).values()
            seen = [rows for kept in sums for rows in kept.seen]
            update = self._update(layer, torch.cat(seen) if seen else None)
            if update is not None:
                updates[layer.name] = update
        return updates

    def _update(self, layer: ProtectedLayer, seen: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        basis, matrix = self._bases[layer.name], layer.matrix
        local = layer.rows(ranks.local_part(matrix.detach()))
        random = torch.randn(local.shape, generator=self._generator).to(local.device)
        rows = null_rows(basis, random, seen)
        if rows is None:
            return None
        if layer.output is None or not layer.output.requires_grad:  # a displacement is held, not A itself
            return rows, None
        up = ranks.local_part(layer.output.detach())
        drawn = torch.randn(up.shape, generator=self._generator).to(device=up.device, dtype=up.dtype)
        return rows, drawn / (max(layer.scale, 1e-12) * max(rows.shape[0], 1) ** 0.5)

    def _moved(self, updates: Mapping[str, tuple[Tensor, Tensor | None]]) -> AbstractContextManager[None]:
        """Put updates on some layers for a while."""
        values: list[tuple[Tensor, Tensor]] = []
        for layer in self._layers:
            if layer.name in updates:
                rows, up = updates[layer.name]
                matrix = layer.rows(ranks.local_part(layer.matrix.detach()))
                values.append((matrix, rows if up is not None else matrix + rows))
                if up is not None and layer.output is not None:
                    values.append((ranks.local_part(layer.output.detach()), up))
        return replaced(values)

    # ------------------------------------------------------------------ who it was

    def _blame(self, before: Tensor, call: ForwardCall, updates: Mapping[str, Any], change: float) -> str:
        names = [layer.name for layer in self._layers if layer.name in updates]
        while len(names) > 1:
            half = names[: len(names) // 2]
            with self._moved({name: updates[name] for name in half}):
                alone = self._change(before, call)
            names = half if ranks.any_rank(alone > self._tolerance(before)) else names[len(names) // 2 :]
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


def null_rows(basis: Basis, random: Tensor, seen: Tensor | None) -> Tensor | None:
    """Turn random rows into unit rows in the null space that are orthogonal to inputs.

    Args:
        basis: Of the layer's inputs; the soft form's null space is everything.
        random: Shape ``(r, width)``.
        seen: Inputs, shape ``(n, width)``; None = there are none.

    Returns:
        Shape ``(r, width)``, rows of norm 1; None where there is no direction left.
    """

    def inside(rows: Tensor) -> Tensor:
        return apply(basis, apply(basis, rows)) if basis.form == "hard" else rows

    exact = basis.width <= _EXACT_WIDTH and random.device.type != "mps"
    start = random.to(torch.float64 if exact else torch.float32)
    rows = inside(start)
    if seen is not None and seen.numel():
        # A row counts by its direction: massive ones must not hide the others.
        _, strength, directions = torch.linalg.svd(inside(_unit(seen.to(start.dtype))), full_matrices=False)
        directions = directions[strength > _NOTHING]
        for _ in range(2):
            rows = inside(rows - (rows @ directions.T) @ directions)
    if float(torch.linalg.vector_norm(rows)) <= _LEAST_ROOM * float(torch.linalg.vector_norm(start)):
        return None
    return _unit(rows).to(torch.float32)


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return unit
