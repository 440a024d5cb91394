"""What is held in place during one fit: each layer by every optimizer that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from nspo_lightning import ranks
from nspo_lightning.evaluation.diagnosis import LEAKED
from nspo_lightning.nullspace import Basis, Calibration, LayerCertificate, ProtectedLayer
from nspo_lightning.nullspace.diagnostics import certify
from nspo_lightning.nullspace.keeper import (
    GradientEnergy,
    NullSpaceKeeper,
    certify_layers,
    local_reference,
    references_of,
    start_layers_,
    whole_reference,
)
from nspo_lightning.terminal import counted


@runtime_checkable
class SwapsWeights(Protocol):
    """An optimizer that keeps weights of its own and puts them in the model's place (schedule-free ones do)."""

    def train(self) -> Any:
        """Put the weights in place that gradients are taken at."""

    def eval(self) -> Any:
        """Put the weights in place that the model is used with."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """An optimizer and what it may not move freely."""

    optimizer: Optimizer
    parameters: int
    keeper: NullSpaceKeeper | None


class Hold:
    """Keepers of a run's optimizers, and parameters that do not train.

    Args:
        layers: What to hold; nothing is held before `set_bases`.
        references: Layer name -> its whole matrix at the start of training, from a checkpoint; where a layer has none,
            training starts now.
        project_gradients: See `NullSpaceKeeper`.
        project_displacement: See `NullSpaceKeeper`.
    """

    def __init__(
        self,
        layers: Sequence[ProtectedLayer] = (),
        *,
        references: Mapping[str, Tensor] | None = None,
        project_gradients: bool = True,
        project_displacement: bool = True,
    ) -> None:
        self._layers = list(layers)
        self._output_energy: Mapping[str, float] = {}
        self._project_gradients, self._project_displacement = project_gradients, project_displacement
        self._references = references_of(self._layers)
        for index, layer in enumerate(self._layers):
            if references and layer.name in references and self._references[index] is not None:
                self._references[index] = local_reference(layer, references[layer.name])
        self._bases: list[Basis] = []
        self._kept: dict[int, _Kept] = {}
        self._handles: list[RemovableHandle] = []
        self._dropped: list[nn.Parameter] = []

    def set_bases(self, calibration: Calibration) -> None:
        """Say what is held: each layer's basis, on the layer's device."""
        self._output_energy, leaders = calibration.output_energy, calibration.leaders()
        on_device: dict[tuple[str, torch.device], Basis] = {}
        for layer in self._layers:
            key = leaders[layer.name], layer.matrix.device
            if key not in on_device:
                on_device[key] = calibration.bases[key[0]].to(key[1])
            self._bases.append(on_device[key])

    def start_(self) -> None:
        """Bring adapters into their null spaces."""
        start_layers_(self._layers, self._bases, self._references)

    def freeze_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let parameters train no longer."""
        if ranks.world_size() > 1:
            # DDP waits for the gradient of every parameter it has seen: let it come, and drop it before the step.
            self._dropped += parameters
            return
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def hook(self, before_step: Callable[[Optimizer], None]) -> None:
        """Project parameters after each step that really happens, of whichever optimizer, known to the Trainer or not.

        The hooks are torch's global ones: a layer is held by every optimizer that trains its matrix, also by one that
        a training step made for itself.

        Args:
            before_step: Called before each step, to look at what the optimizer would move.
        """
        self._handles = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer, before_step)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._after_step(optimizer)),
        ]

    def release(self) -> None:
        """Leave no hooks on optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_step(self, optimizer: Optimizer, look: Callable[[Optimizer], None]) -> None:
        look(optimizer)
        if (keeper := self._keeper(optimizer)) is not None:
            keeper.remember()

    def _after_step(self, optimizer: Optimizer) -> None:
        if (keeper := self._keeper(optimizer)) is not None:
            keeper.reproject_()

    def refuse_swapping(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers whose state holds weights that are never projected.

        Raises:
            MisconfigurationException: Naming the first one that trains a held matrix.
        """
        for optimizer in optimizers:
            if isinstance(optimizer, SwapsWeights) and self._keeper(optimizer) is not None:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} keeps weights in its own state and puts them in the model's place "
                    "(`train()`, `eval()`): what it keeps is never projected, so it would leave the null space. Use an "
                    "optimizer without such state, for example AdamW."
                )

    def _keeper(self, optimizer: Optimizer) -> NullSpaceKeeper | None:
        """Return the keeper of an optimizer's matrices, None if it trains none; parameters may be added on the way."""
        kept, count = self._kept.get(id(optimizer)), sum(len(group["params"]) for group in optimizer.param_groups)
        if kept is None or kept.optimizer is not optimizer or kept.parameters != count:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            mine = [i for i, layer in enumerate(self._layers) if id(layer.matrix) in ids]
            keeper = None
            if mine:
                keeper = NullSpaceKeeper(
                    [self._layers[i] for i in mine],
                    [self._bases[i] for i in mine],
                    [self._references[i] for i in mine],
                    project_gradients=self._project_gradients,
                    project_displacement=self._project_displacement,
                )
            kept = self._kept[id(optimizer)] = _Kept(optimizer=optimizer, parameters=count, keeper=keeper)
        return kept.keeper

    def project_gradients_(self, optimizer: Optimizer, *, measure: bool) -> GradientEnergy | None:
        """Project the gradients of an optimizer's matrices, and drop those of frozen parameters."""
        for parameter in self._dropped:
            parameter.grad = None
        keeper = self._keeper(optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)
        return None if keeper is None else keeper.project_gradients_(measure=measure)

    def refuse_leaks(self) -> None:
        """Refuse an adapter of a checkpoint or a warm start that does not lie in the null space: neither B A nor A may.

        Raises:
            MisconfigurationException: Naming the layer with the largest leak.
        """
        leaking = [c for c in (*self.certificates(), *self._without_output()) if c.leak > LEAKED]
        if leaking:
            worst, layers = max(leaking, key=lambda c: c.leak), len({c.name for c in leaking})
            raise MisconfigurationException(
                "What was trained before does not lie in the null space of this basis: "
                f"{counted(layers, 'layer leaks', 'layers leak')}, {worst.name} by {worst.leak:.2g}. It was trained "
                "with other text, another basis or no projection. Give `calibration` the basis file of that run, "
                "warm up again in this null space, or merge the adapter and start a new one."
            )

    def is_of(self, layers: Sequence[ProtectedLayer]) -> bool:
        """Return whether these very matrices, and no others, are held."""
        return {id(layer.matrix) for layer in self._layers} == {id(layer.matrix) for layer in layers}

    @property
    def holds_weights(self) -> bool:
        """Whether the displacement of whole matrices is held, and not adapters alone."""
        return any(reference is not None for reference in self._references)

    def certificates(self) -> list[LayerCertificate]:
        """Return each layer's certificate."""
        if not self._bases:
            return []
        return certify_layers(self._layers, self._bases, self._references, self._output_energy)

    @torch.no_grad()
    def _without_output(self) -> list[LayerCertificate]:
        """Return certificates of each A alone, whatever B makes of it now."""
        held = zip(self._layers, self._bases, self._references, strict=True)
        return [
            certify(layer.name, basis, layer.rows(ranks.full_tensor(layer.matrix.detach())))
            for layer, basis, reference in held
            if reference is None
        ]

    def whole_references(self) -> dict[str, Tensor]:
        """Return layer name -> its whole matrix at the start, where displacements are held; for checkpoints."""
        pairs = zip(self._layers, self._references, strict=True)
        return {layer.name: whole_reference(layer, r).cpu() for layer, r in pairs if r is not None}

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Run the model that training started from, whatever has been trained since."""
        with at_start(self._layers, dict(zip((layer.name for layer in self._layers), self._references, strict=True))):
            yield


@contextmanager
def at_start(layers: Sequence[ProtectedLayer], references: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Run the model that training started from: a trained B is zero, other matrices are at their references.

    Other adapters stay as they are: a frozen one beside the trained one belongs to the model.

    Args:
        layers: What trains.
        references: Layer name -> this rank's rows at the start; a layer without any keeps its matrix.
    """
    values: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        matrix, reference = ranks.local_part(layer.matrix.detach()), references.get(layer.name)
        if reference is not None:
            values.append((layer.rows(matrix), reference))
        elif layer.output is not None and layer.output.requires_grad:
            up = ranks.local_part(layer.output.detach())
            values.append((up, torch.zeros_like(up)))
    with replaced(values):
        yield


@contextmanager
def replaced(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put values into tensors, and the old ones back, to the bit."""
    kept = [(target, target.clone()) for target, _ in values]
    with torch.no_grad():
        try:
            for target, value in values:
                target.copy_(value)
            yield
        finally:
            for target, value in kept:
                target.copy_(value)
