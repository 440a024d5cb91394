"""What an update does to a model's own predictions, to second order, from sums that are taken once.

With x an input of a linear layer and g the gradient, at the layer's output, of -log p(label) for labels that are drawn
from the model itself, an update D of the layer moves the model's distribution by

    KL(base || moved) = E[(g^T D x)^2] / 2 + O(D^3)    nats a token,

the Fisher information's quadratic form. Its Kronecker factors (K-FAC, arXiv 1503.05671; as a pull back to earlier
weights: arXiv 1805.07810) make it tr(G D C D^T) / 2, here with

    G = sum g g^T / N,    C = sum |g|^2 x x^T / sum |g|^2    over the positions of N tokens:

a position counts in C as much as outputs depend on it, so G (x) C has the trace of the Fisher information itself.
(The plain mean of x x^T counts most what enters a first token, whose inputs are huge and whose outputs hardly matter.)

A side that is wider than a limit is kept as so many random combinations of its rows, R X, whose moment X^T R^T R X is
that of X in expectation. Torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.covariance import add_gram_, mirror_
from nspo_lightning.nullspace.experts import ExpertInputs
from nspo_lightning.nullspace.layers import ProtectedLayer
from nspo_lightning.nullspace.modes import adapters_off, evaluation_mode

TextLoss = Callable[[Mapping[str, Any]], tuple[Tensor, int]]
"""Maps a batch to the sum over its tokens of -log p(label), labels drawn from p, and how many tokens."""


@dataclass(frozen=True)
class Moment:
    """A second moment M, whole or as a sketch.

    Attributes:
        factor: M itself, shape ``(width, width)``; or F of M = F^T F, shape ``(rows, width)``.
        whole: Which of the two.
    """

    factor: Tensor
    whole: bool

    def times(self, rows: Tensor) -> Tensor:
        """Return rows M; shape ``(n, width)``, as the rows.

        Example:
            >>> rows = torch.tensor([[1.0, 2.0]])
            >>> Moment(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), whole=True).times(rows)
            tensor([[2., 2.]])
            >>> Moment(torch.tensor([[1.0, 1.0]]), whole=False).times(rows)
            tensor([[3., 3.]])
        """
        return rows @ self.factor if self.whole else (rows @ self.factor.T) @ self.factor


class RunningMoment:
    """Running sum of x x^T over rows x, in float32.

    Args:
        width: Features.
        limit: A moment of more features is a sketch of so many rows.
        seed: Of the sketch.
    """

    def __init__(self, width: int, limit: int, seed: int) -> None:
        self._whole = width <= limit
        self._shape = (width if self._whole else limit, width)
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._sum: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Add rows, shape ``(n, width)``, float32."""
        if self._sum is None:
            self._sum = rows.new_zeros(self._shape)
            self._generator = torch.Generator(rows.device).manual_seed(self._seed)
        if self._whole:
            add_gram_(self._sum, rows)
            return
        drawn = torch.randn(self._shape[0], len(rows), device=rows.device, generator=self._generator)
        with torch.autocast(device_type=rows.device.type, enabled=False):
            self._sum.addmm_(drawn, rows, alpha=self._shape[0] ** -0.5)

    def take(self, divisor: float, device: torch.device) -> Moment:
        """Return the sum over rows of all ranks divided by a number, in its memory (cross-rank synchronisation)."""
        total = torch.zeros(self._shape, device=device) if self._sum is None else self._sum
        if self._whole:
            mirror_(total)
        self._sum = None
        total = ranks.all_reduce_sum(total)
        return Moment(total.div_(divisor if self._whole else divisor**0.5), self._whole)


@dataclass(frozen=True)
class LayerCurvature:
    """The second-order KL of one layer's update: D = s B A of an adapter, D = W - W0 of a whole weight.

    Attributes:
        layer: The layer.
        inputs: C.
        outputs: G, nats a token.
        start: W0, of the weight's own shape; None for an adapter.
    """

    layer: ProtectedLayer
    inputs: Moment
    outputs: Moment
    start: Tensor | None = None

    @torch.no_grad()
    def pull(self) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Return tr(G D C D^T) / 2, nats a token, and its gradients with respect to A and B, or to W."""
        matrix, output = self.layer.matrix, self.layer.output
        if output is None:
            moved = matrix.detach() if self.start is None else matrix.detach() - self.start
            update = self.layer.rows(moved).float()
            pulled = self.outputs.times(self.inputs.times(update).T).T  # G D C
            return 0.5 * (pulled * update).sum(), {matrix: self.layer.rows(pulled)}
        a, b = matrix.detach().float(), output.detach().float()
        right, left = self.inputs.times(a), self.outputs.times(b.T)  # A C, and (G B)^T
        inner, outer = left @ b, right @ a.T  # B^T G B, and A C A^T
        square = self.layer.scale**2
        return 0.5 * square * (inner * outer).sum(), {
            matrix: square * (inner @ right),
            output: square * (left.T @ outer),
        }


class Curvature:
    """The second-order KL of all layers' updates together, layer by layer (no term between layers).

    Attributes:
        layers: Of each layer.
        tokens: How many it was measured on.
    """

    def __init__(self, layers: Sequence[LayerCurvature], tokens: int) -> None:
        self.layers = tuple(layers)
        self.tokens = tokens

    def pull(self) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Return the KL, nats a token, and its gradient with respect to each parameter that is trained."""
        total: Tensor | None = None
        gradients: dict[nn.Parameter, Tensor] = {}
        for of in self.layers:
            kl, found = of.pull()
            total = kl if total is None else total + kl
            gradients |= {parameter: gradient for parameter, gradient in found.items() if parameter.requires_grad}
        return (torch.zeros(()) if total is None else total), gradients

    def held_bytes(self) -> int:
        """Return the bytes of the moments, and of whole weights as they were."""
        moments = sum(moment.factor.nbytes for of in self.layers for moment in (of.inputs, of.outputs))
        return moments + sum(of.start.nbytes for of in self.layers if of.start is not None)


def check_layers(layers: Iterable[ProtectedLayer]) -> list[ProtectedLayer]:
    """Return layers that are linear maps of their own inputs.

    Raises:
        ValueError: For a mixture's experts, with the way out.
    """
    listed = list(layers)
    for layer in listed:
        if layer.experts != 1 or isinstance(layer.module, ExpertInputs):
            raise ValueError(
                f"{layer.name} are weights of a mixture's experts, and the second-order KL is known for linear layers. "
                "Adapt linear layers alone, by name (LoRA: `target_modules: [q_proj, k_proj, v_proj, o_proj]`)."
            )
    return listed


def measure_curvature(
    model: nn.Module,
    layers: Iterable[ProtectedLayer],
    batches: Iterable[Mapping[str, Any]],
    loss: TextLoss,
    *,
    width_limit: int,
    after_batch: Callable[[], None] = lambda: None,
) -> Curvature:
    """Measure the curvature of a model's base (its adapters off) on text (cross-rank synchronisation).

    Args:
        model: Run in eval mode, with its adapters off, and left as it was.
        layers: Of it; adapters, or whole weights, which are as the base's now.
        batches: The same on all ranks, which share them out.
        loss: See `TextLoss`; must run the model.
        width_limit: Sides that are wider are kept as so many random combinations of their rows.
        after_batch: Called after each batch.

    Returns:
        The curvature, on the device of each layer.

    Raises:
        ValueError: If a layer is of a mixture's experts, if no text reaches one, or if what was found is not finite.
    """
    held = check_layers(layers)
    sums = [_Sums(layer, width_limit, seed=2 * (i + len(held) * ranks.rank())) for i, layer in enumerate(held)]
    weights = [weight for layer in held for weight in (layer.matrix, layer.output) if weight is not None]
    tokens = 0
    for number, batch in enumerate(batches):
        if number % ranks.world_size() == ranks.rank():
            with evaluation_mode(model), adapters_off(model), torch.enable_grad(), _listening(sums) as leaves:
                total, count = loss(batch)
                trained = [weight for weight in weights if weight.requires_grad]  # PEFT: not with its adapters off
                torch.autograd.grad(total, [*leaves, *trained], allow_unused=True)
            tokens += count
        after_batch()
    tokens = int(ranks.all_reduce_sum(torch.tensor(float(tokens), dtype=torch.float64)))
    return Curvature([of.take(tokens) for of in sums], tokens)


class _Sums:
    """The running sums of one layer."""

    def __init__(self, layer: ProtectedLayer, limit: int, seed: int) -> None:
        self.layer = layer
        self.device = layer.matrix.device
        outputs = layer.rows(layer.matrix).shape[0] if layer.output is None else layer.output.shape[0]
        self.inputs = RunningMoment(layer.width, limit, seed)
        self.outputs = RunningMoment(outputs, limit, seed + 1)
        self.energy = torch.zeros((), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add the positions of a forward pass; shapes ``(..., in)`` and ``(..., out)``."""
        x, g = inputs.flatten(0, -2).float(), gradients.flatten(0, -2).float()
        square = g.square().sum(1)
        self.energy += square.sum(dtype=torch.float64)
        self.inputs.update(x * square.sqrt().unsqueeze(1))
        self.outputs.update(g)

    def take(self, tokens: int) -> LayerCurvature:
        """Return what the sums of all ranks say (cross-rank synchronisation)."""
        energy = float(ranks.all_reduce_sum(self.energy.cpu()))
        if not 0 < energy < float("inf"):
            raise ValueError(
                f"No finite gradient of the text reaches {self.layer.name} (sum of squares: {energy:g}): either the "
                "text does not pass through that layer, or what the model says of it is not finite. Leave the "
                "layer out of `target_modules`, or look at the text (`python -m nspo_lightning data`)."
            )
        inputs, outputs = self.inputs.take(energy, self.device), self.outputs.take(max(tokens, 1), self.device)
        start = self.layer.matrix.detach().clone() if self.layer.output is None else None
        return LayerCurvature(self.layer, inputs, outputs, start)


@contextmanager
def _listening(sums: Iterable[_Sums]) -> Iterator[list[Tensor]]:
    """Hear inputs and output gradients of layers.

    Nothing is trained with the adapters off, so the first layers' outputs are made to need a gradient.

    Yields:
        Those outputs, which the gradient must be asked for.
    """
    leaves: list[Tensor] = []

    def hook_of(of: _Sums) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
                leaves.append(output)
            inputs = args[0].detach()
            output.register_hook(lambda gradient: of.update(inputs, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    handles = [of.layer.module.register_forward_hook(hook_of(of)) for of in sums]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
