"""What is held in place during one fit: each layer by the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nspo_lightning import ranks
from nspo_lightning.nullspace import Basis, Calibration, LayerCertificate, ProtectedLayer
from nspo_lightning.nullspace.keeper import GradientEnergy, NullSpaceKeeper

_RESUME_LEAK = 1e-4  # a resumed adapter sits at about 1e-7; anything above this was trained without this basis


class Hold:
    """Keepers of a run's optimizers, and parameters that do not train.

    Args:
        optimizers: The run's optimizers; a layer belongs to the first one that trains it.
        layers: What to hold.
        calibration: Has a basis for each layer; None = nothing is held.
        project_gradients: See `NullSpaceKeeper`.
        project_displacement: See `NullSpaceKeeper`.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer] = (),
        layers: Sequence[ProtectedLayer] = (),
        calibration: Calibration | None = None,
        *,
        project_gradients: bool = True,
        project_displacement: bool = True,
    ) -> None:
        self._optimizers = list(optimizers)
        self._output_energy = {} if calibration is None else calibration.output_energy
        self._keepers: dict[int, NullSpaceKeeper] = {}
        self._handles: list[RemovableHandle] = []
        self._dropped: list[nn.Parameter] = []
        if calibration is None:
            return
        on_device: dict[tuple[int, torch.device], Basis] = {}
        remaining = list(layers)
        for optimizer in optimizers:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            mine = [m for m in remaining if ids & {id(m.matrix), id(m.output)}]
            remaining = [m for m in remaining if m not in mine]
            bases = []
            for layer in mine:
                basis, device = calibration.basis_of(layer.name), layer.matrix.device
                bases.append(on_device.setdefault((id(basis), device), basis.to(device)))
            self._keepers[id(optimizer)] = NullSpaceKeeper(
                mine, bases, project_gradients=project_gradients, project_displacement=project_displacement
            )

    def start_(self) -> None:
        """Bring adapters into their null spaces."""
        for keeper in self._keepers.values():
            keeper.start_()

    def freeze_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let parameters train no longer."""
        if ranks.world_size() > 1:
            # DDP waits for the gradient of every parameter it has seen: let it come, and drop it before the step.
            self._dropped += parameters
            return
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def hook(self) -> None:
        """Project parameters after each step that really happens."""
        for optimizer in self._optimizers:
            keeper = self._keepers[id(optimizer)]
            self._handles.append(optimizer.register_step_post_hook(lambda *_, k=keeper: k.reproject_()))

    def release(self) -> None:
        """Leave no hooks on the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def project_gradients_(self, optimizer: Optimizer, *, measure: bool) -> GradientEnergy | None:
        """Project the gradients of an optimizer's matrices, and drop those of frozen parameters."""
        for parameter in self._dropped:
            parameter.grad = None
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        keeper = self._keepers.get(id(inner))
        return None if keeper is None else keeper.project_gradients_(measure=measure)

    def refuse_leaks(self) -> None:
        """Refuse a checkpoint's adapter that does not lie in the null space.

        Raises:
            MisconfigurationException: Naming the layer with the largest leak.
        """
        leaking = [c for c in self.certificates() if c.leak > _RESUME_LEAK]
        if leaking:
            worst = max(leaking, key=lambda c: c.leak)
            raise MisconfigurationException(
                f"The checkpoint's adapter does not lie in the null space of this basis: {len(leaking)} layers leak, "
                f"{worst.name} by {worst.leak:.2g}. It was trained with another basis or without projection. Give "
                "`calibration` the basis file of that run, or merge the adapter and start a new one."
            )

    def certificates(self) -> list[LayerCertificate]:
        """Return each layer's certificate."""
        return [c for keeper in self._keepers.values() for c in keeper.certificates(self._output_energy)]
