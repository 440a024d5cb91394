"""Keeps a set of trained matrices inside their null spaces, optimizer step by optimizer step.

    start_()              A <- A P, old norm            once, before training, while B = 0
    project_gradients_()  grad <- grad P                after backward, before clipping
    remember()            (soft form)                   before each real optimizer step
    reproject_()          A <- A P, W <- W_ref + (W - W_ref) P       after each real optimizer step

Both projections in a step are needed. Adam's elementwise preconditioner D leaves the subspace (so project after), and
projecting only after moves along P D g, which can be an ascent direction; with both, the step is along P D P g, and
<g, P D P g> = ||D^(1/2) P g||^2 >= 0.

In the soft form P is S = (I + C/m)^(-1/2), and the optimizer works in coordinates A~ with A = A~ S: the gradient
becomes grad S, and of the step D~ that the optimizer takes, A moves by D~ S. No inverse of S is ever formed, and a
step that a gradient scaler skips leaves nothing to undo. (Decoupled weight decay is damped like the rest of the step.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.compat.torch import copy_all_
from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.diagnostics import LayerCertificate, certify
from nspo_lightning.nullspace.layers import ProtectedLayer
from nspo_lightning.nullspace.packing import build_packs
from nspo_lightning.nullspace.projection import project_start


@dataclass(frozen=True, kw_only=True)
class GradientEnergy:
    """Squared norms of the projected matrices' gradients, as tensors (reading them synchronises with the device)."""

    before: Tensor
    after: Tensor


class NullSpaceKeeper:
    """Holds matrices in place; one for each optimizer.

    Args:
        layers: The layers to hold.
        bases: One for each layer, on the layer's device.
        references: This rank's rows of each layer's matrix at the start of training, None where A itself is held;
            without any, the matrices as they are now.
        project_gradients: False = gradients are left alone.
        project_displacement: False = matrices are not brought back after a step (leaks under adaptive optimizers).
    """

    def __init__(
        self,
        layers: Sequence[ProtectedLayer],
        bases: Sequence[Basis],
        references: Sequence[Tensor | None] | None = None,
        *,
        project_gradients: bool = True,
        project_displacement: bool = True,
    ) -> None:
        self.layers, self.bases = tuple(layers), tuple(bases)
        self._project_gradients, self._project_displacement = project_gradients, project_displacement
        self._soft = any(basis.form == "soft" for basis in bases)
        self._references = tuple(references_of(self.layers) if references is None else references)
        self._anchored = [reference is not None for reference in self._references]
        self._trained = [i for i, layer in enumerate(self.layers) if layer.matrix.requires_grad]
        values = self._matrices()
        keys = [(v.dtype, v.device, self._anchored[i]) for i, v in zip(self._trained, values, strict=True)]
        self._packs = build_packs([v.shape[0] for v in values], [self.bases[i] for i in self._trained], keys)
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def start_(self) -> None:
        """Bring adapters into the null space. Full weights and adapters with a frozen B start where they are."""
        start_layers_(self.layers, self.bases, self._references)

    @torch.no_grad()
    def project_gradients_(self, *, measure: bool = False) -> GradientEnergy | None:
        """Project the gradients in place; matrices without a gradient are passed over.

        Args:
            measure: Also return the squared norms.

        Returns:
            The squared norms, None unless asked for.
        """
        if not (self._project_gradients or measure):
            return None
        gradients = self._gradients()
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, self._matrices(), strict=True)]
        before: list[Tensor] = []
        after: list[Tensor] = []
        for pack in self._packs:
            stacked = pack.gather(filled)
            projected = pack.apply(stacked) if self._project_gradients else stacked
            if measure:
                before.append(stacked.square().sum(dtype=torch.float32))
                after.append(projected.square().sum(dtype=torch.float32))
            if self._project_gradients:
                _write([gradients[slot.index] for slot in pack.slots], pack.split(projected))
        if not measure or not before:
            return None
        return GradientEnergy(before=torch.stack(before).sum(), after=torch.stack(after).sum())

    @torch.no_grad()
    def remember(self) -> None:
        """Note the matrices before an optimizer step (however often its closure is evaluated), for the soft form."""
        if self._soft and self._project_displacement:
            values = self._matrices()
            self._before = [pack.gather(values).clone() for pack in self._packs]

    @torch.no_grad()
    def reproject_(self) -> None:
        """Bring the matrices back after an optimizer step."""
        if not self._project_displacement or (self._soft and self._before is None):
            return
        values = self._matrices()
        references = [self._reference(i) for i in self._trained] if any(self._anchored) else []
        for number, pack in enumerate(self._packs):
            stacked = pack.gather(values)
            if self._before is not None:
                stacked = stacked - pack.component(stacked - self._before[number])
            elif self._anchored[self._trained[pack.slots[0].index]]:
                reference = pack.gather(references)
                stacked = reference + pack.apply(stacked - reference)
            else:
                stacked = pack.apply(stacked)
            _write([values[slot.index] for slot in pack.slots], pack.split(stacked))
        self._before = None

    def _matrices(self) -> list[Tensor]:
        return [_values(self.layers[i]) for i in self._trained]

    def _gradients(self) -> list[Tensor | None]:
        members = [self.layers[i] for i in self._trained]
        return [None if m.matrix.grad is None else m.rows(ranks.local_part(m.matrix.grad)) for m in members]

    def _reference(self, index: int) -> Tensor:
        reference = self._references[index]
        return reference if reference is not None else _values(self.layers[index])


def references_of(layers: Sequence[ProtectedLayer]) -> list[Tensor | None]:
    """Return what displacements are measured from: this rank's rows of full weights, and of A under a frozen B.

    None for an adapter whose B trains: its A itself lies in the null space.
    """
    anchored = [x.kind != "lora" or (x.output is not None and not x.output.requires_grad) for x in layers]
    return [_values(layer).clone() if held else None for layer, held in zip(layers, anchored, strict=True)]


@torch.no_grad()
def certify_layers(
    layers: Sequence[ProtectedLayer],
    bases: Sequence[Basis],
    references: Sequence[Tensor | None],
    output_energy: Mapping[str, float],
) -> list[LayerCertificate]:
    """Return a certificate of every layer's update since the start; see `NullSpaceKeeper` and `Calibration`."""
    found = []
    for layer, basis, reference in zip(layers, bases, references, strict=True):
        update = layer.rows(ranks.full_tensor(layer.matrix.detach()))
        if reference is not None:
            update = update - layer.rows(whole_reference(layer, reference))
        up = None if layer.output is None else ranks.full_tensor(layer.output.detach())
        energy = output_energy.get(layer.name)
        found.append(
            certify(layer.name, basis, update, up=up, scale=layer.scale, experts=layer.experts, output_energy=energy)
        )
    return found


@torch.no_grad()
def start_layers_(
    layers: Sequence[ProtectedLayer], bases: Sequence[Basis], references: Sequence[Tensor | None]
) -> None:
    """Bring each A that has no reference into the null space, at its old norm."""
    for layer, basis, reference in zip(layers, bases, references, strict=True):
        if reference is None:
            # Where rows are sharded, on the whole of it: the norm is one over all rows.
            matrix = layer.matrix.detach()
            started = project_start(basis, ranks.full_tensor(matrix))
            matrix.copy_(ranks.sharded_like(started, matrix))


def _values(layer: ProtectedLayer) -> Tensor:
    """Return this rank's rows, sharing memory with the parameter."""
    return layer.rows(ranks.local_part(layer.matrix.detach()))


def whole_reference(layer: ProtectedLayer, reference: Tensor) -> Tensor:
    """Return a whole reference, shaped as the parameter is, from this rank's rows of it."""
    everywhere = layer.matrix.detach().clone()
    layer.rows(ranks.local_part(everywhere)).copy_(reference)
    return ranks.full_tensor(everywhere)


def local_reference(layer: ProtectedLayer, whole: Tensor) -> Tensor:
    """Return this rank's rows of a whole reference: the inverse of `whole_reference`."""
    like = layer.matrix.detach()
    here = whole.to(device=ranks.local_part(like).device, dtype=like.dtype)
    return layer.rows(ranks.local_part(ranks.sharded_like(here, like))).clone()


def _write(targets: list[Tensor | None], sources: list[Tensor]) -> None:
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t is not None]
    if pairs:
        copy_all_([t for t, _ in pairs], [s for _, s in pairs])
