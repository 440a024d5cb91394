"""What an update does to a model's own predictions, to second order, from sums that are taken once.

With x_t the inputs of a linear layer at the positions t of a text and g_t the gradients, at its outputs, of
-log p(labels) for labels that are drawn from the model itself, an update D of the layer moves what the model says by

    KL(base || moved) = E[(sum_t g_t^T D x_t)^2] / 2 + O(D^3),

the Fisher information's quadratic form. Its Kronecker factors (K-FAC, arXiv 1503.05671; as a pull back to earlier
weights: arXiv 1805.07810) make it tr(G D C D^T) / 2 nats a token, here with

    C = sum |g_t|^2 x_t x_t^T / sum |g_t|^2,    G ~ sum g_t g_t^T,

G scaled so that tr G tr C is the trace of that form, sums over a text's positions included: what is foretold of updates
in random directions is right on average, layer by layer. A position counts in C as much as outputs depend on it. (The
plain mean of x x^T counts most what enters a first token, whose inputs are huge and whose outputs hardly matter.)

A side that is wider than a limit is kept as a Nystrom approximation of so many directions (arXiv 1706.05736), and the
energy that is left spread evenly over the others: no direction is free. Torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.compat.torch import full_precision_products
from nspo_lightning.nullspace.basis import working_dtype
from nspo_lightning.nullspace.covariance import add_gram_, mirror_
from nspo_lightning.nullspace.experts import ExpertInputs
from nspo_lightning.nullspace.layers import ProtectedLayer
from nspo_lightning.nullspace.modes import adapters_off, evaluation_mode
from nspo_lightning.nullspace.sketch import RangeSketch, random_test_matrix

TextLoss = Callable[[Mapping[str, Any]], tuple[Tensor, int]]
"""Maps a batch to the sum over its tokens of -log p(label), labels drawn from p, and how many tokens."""


@dataclass(frozen=True)
class Moment:
    """A second moment M, whole or in its leading directions.

    Attributes:
        factor: M itself, shape ``(width, width)``; or orthonormal rows Q, shape ``(directions, width)``.
        values: None for M itself; else v of M = Q^T diag(v) Q + rest I, shape ``(directions,)``.
        rest: What a direction outside Q has.
    """

    factor: Tensor
    values: Tensor | None = None
    rest: float = 0.0

    def times(self, rows: Tensor) -> Tensor:
        """Return rows M; shape ``(n, width)``, as the rows.

        Example:
            >>> rows = torch.tensor([[1.0, 2.0]])
            >>> Moment(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).times(rows)
            tensor([[2., 2.]])
            >>> Moment(torch.tensor([[1.0, 0.0]]), torch.tensor([3.0]), rest=0.5).times(rows)
            tensor([[3.5000, 1.0000]])
        """
        if self.values is None:
            return rows @ self.factor
        return ((rows @ self.factor.T) * self.values) @ self.factor + self.rest * rows

    def trace(self) -> float:
        """Return tr M."""
        if self.values is None:
            return float(self.factor.trace())
        return float(self.values.sum()) + self.rest * self.factor.shape[1]


class RunningMoment:
    """Running sum of x x^T over rows x, in float32.

    Args:
        width: Features.
        limit: A moment of more features is kept in so many directions.
        seed: Of the random directions that a wider one is looked at in; the same on all ranks.
    """

    def __init__(self, width: int, limit: int, seed: int) -> None:
        self._width = width
        self._test = (width, limit, seed)
        self._sketch = RangeSketch(width, random_test_matrix(*self._test)) if width > limit else None
        self._sum: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Add rows, shape ``(n, width)``, float32."""
        if self._sketch is not None:
            self._sketch.update(rows)
            return
        if self._sum is None:
            self._sum = rows.new_zeros(self._width, self._width)
        add_gram_(self._sum, rows)

    def take(self, divisor: float, device: torch.device) -> Moment:
        """Return the sum over rows of all ranks divided by a number (cross-rank synchronisation)."""
        if self._sketch is None:
            total = torch.zeros(self._width, self._width, device=device) if self._sum is None else self._sum
            self._sum = None
            return Moment(ranks.all_reduce_sum(mirror_(total)).div_(divisor))
        self._sketch.all_reduce()
        looked = random_test_matrix(*self._test).to(device)
        return _nystrom(self._sketch.take().to(device), looked, self._sketch.trace, divisor)


def _nystrom(seen: Tensor, looked: Tensor, trace: float, divisor: float) -> Moment:
    """Return M in the directions that S = M O shows, and the rest of its trace spread over the others.

    Args:
        seen: S, shape ``(width, directions)``, before it is divided.
        looked: O, of the same shape.
        trace: tr M, before it is divided.
        divisor: Of both.
    """
    width, directions = seen.shape
    dtype = working_dtype(directions, seen.device.type)
    s, o = seen.to(dtype), looked.to(dtype)
    shift = torch.finfo(torch.float32).eps * trace
    s = s + shift * o
    lower = _cholesky(o.T @ s, shift * o.square().sum(0).mean())
    b = torch.linalg.solve_triangular(lower, s.T, upper=False).T
    squares, vectors = torch.linalg.eigh(b.T @ b)
    kept = squares > 10 * shift
    squares, vectors = squares[kept], vectors[:, kept]
    q = (b @ (vectors / squares.sqrt())).T
    values = (squares - shift).clamp_min(0)
    rest = max(trace - float(values.sum()), 0.0) / (width - len(values))
    scaled = ((values - rest) / divisor).to(seen.dtype)
    return Moment(q.to(seen.dtype).contiguous(), scaled, rest / divisor)


def _cholesky(core: Tensor, shift: Tensor) -> Tensor:
    """Factorise a moment that rounding may have left a little indefinite."""
    core = (core + core.T) / 2
    for power in range(8):
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(core + (10.0**power - 1) * shift * torch.eye(len(core)).to(core))
        if not int(failed):
            return lower
    raise ValueError("A second moment of gradients is not positive: what was measured is not finite.")


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
        """Return tr(G D C D^T) / 2, nats a token, and its gradients with respect to A and B, or to W, in float32.

        Products are as precise as the caller's context has them, see `Curvature.pull`.
        """
        matrix, output = self.layer.matrix, self.layer.output
        if output is None:
            assert self.start is not None  # `_Sums.take` keeps it
            update = self.layer.rows(matrix.detach() - self.start).float()
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
        if not layers:
            raise ValueError("There is no layer whose curvature could be measured: nothing is trained.")
        self.layers = tuple(layers)
        self.tokens = tokens

    def pull(self) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Return the KL, nats a token, and its gradient with respect to each parameter that is trained."""
        device = self.layers[0].layer.matrix.device
        total = torch.zeros((), device=device)
        gradients: dict[nn.Parameter, Tensor] = {}
        with torch.autocast(device_type=device.type, enabled=False), full_precision_products():
            for of in self.layers:
                kl, found = of.pull()
                total += kl.to(device)
                gradients |= {parameter: gradient for parameter, gradient in found.items() if parameter.requires_grad}
        return total, gradients

    def held_bytes(self) -> int:
        """Return the bytes of the moments' directions, and of whole weights as they were."""
        moments = sum(moment.factor.nbytes for of in self.layers for moment in (of.inputs, of.outputs))
        return moments + sum(of.start.nbytes for of in self.layers if of.start is not None)


def needed_bytes(layers: Iterable[ProtectedLayer], width_limit: int) -> int:
    """Return the bytes that measuring the moments takes; of sides over the limit half of it are kept."""
    widths = [width for layer in layers for width in (layer.width, _outputs_of(layer))]
    return 4 * sum(width * (width if width <= width_limit else 2 * width_limit) for width in widths)


def _outputs_of(layer: ProtectedLayer) -> int:
    return int((layer.rows(layer.matrix) if layer.output is None else layer.output).shape[0])


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
        width_limit: Sides that are wider are kept in so many directions.
        after_batch: Called after each batch.

    Returns:
        The curvature, on the device of each layer.

    Raises:
        ValueError: If a layer is of a mixture's experts, if no text reaches one, or if what was found is not finite.
    """
    held = check_layers(layers)
    sums = [_Sums(layer, width_limit, seed=2 * i) for i, layer in enumerate(held)]
    tokens = 0
    for number, batch in enumerate(batches):
        if number % ranks.world_size() == ranks.rank():
            with evaluation_mode(model), adapters_off(model), torch.enable_grad(), _listening(sums):
                total, count = loss(batch)
                if leaves := _leaves_of(total):  # none where no token is scored
                    torch.autograd.grad(total, leaves)
            tokens += count
        after_batch()
    tokens = int(ranks.all_reduce_sum(torch.tensor(float(tokens), dtype=torch.float64)))
    return Curvature([of.take(tokens) for of in sums], tokens)


class _Sums:
    """The running sums of one layer."""

    def __init__(self, layer: ProtectedLayer, limit: int, seed: int) -> None:
        self.layer = layer
        self.device = layer.matrix.device
        self.inputs = RunningMoment(layer.width, limit, seed)
        self.outputs = RunningMoment(_outputs_of(layer), limit, seed + 1)
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.energy = torch.zeros(2, dtype=kind, device=self.device)  # of the gradients, and of the whole form

    @torch.no_grad()
    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add the positions of a forward pass; shapes ``(texts, positions, in)`` and ``(texts, positions, out)``.

        Other shapes are texts of one position each.
        """
        x, g = inputs.float(), gradients.float()
        if x.ndim != 3 or g.ndim != 3:
            x, g = x.reshape(-1, 1, x.shape[-1]), g.reshape(-1, 1, g.shape[-1])
        with torch.autocast(device_type=x.device.type, enabled=False), full_precision_products():
            whole = ((x @ x.mT) * (g @ g.mT)).sum()  # over texts, of |sum_t g_t x_t^T|^2
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        square = g.square().sum(1)
        self.energy += torch.stack([square.sum(dtype=self.energy.dtype), whole.to(self.energy.dtype)])
        self.inputs.update(x * square.sqrt().unsqueeze(1))
        self.outputs.update(g)

    def take(self, tokens: int) -> LayerCurvature:
        """Return what the sums of all ranks say (cross-rank synchronisation)."""
        energy, whole = ranks.all_reduce_sum(self.energy.cpu()).tolist()
        if not (0 < energy < math.inf and whole > 0):
            raise ValueError(
                f"No finite gradient of the text reaches {self.layer.name} (sum of squares: {energy:g}): either the "
                "text does not pass through that layer, or what the model says of it is not finite. Leave the "
                "layer out of `target_modules`, or look at the text (`python -m nspo_lightning data`)."
            )
        inputs = self.inputs.take(energy, self.device)
        outputs = self.outputs.take(energy * inputs.trace() / whole * tokens, self.device)  # tr G tr C = whole / tokens
        start = self.layer.matrix.detach().clone() if self.layer.output is None else None
        return LayerCurvature(self.layer, inputs, outputs, start)


@contextmanager
def _listening(sums: Iterable[_Sums]) -> Iterator[None]:
    """Hear inputs and output gradients of layers.

    Nothing is trained with the adapters off, so outputs that need no gradient, the first ones, are made to.
    """

    def hook_of(of: _Sums) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not args:
                raise TypeError(f"{of.layer.name} must be called with its input as first positional argument.")
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            inputs = args[0].detach()
            output.register_hook(lambda gradient: of.update(inputs, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    handles = [of.layer.module.register_forward_hook(hook_of(of)) for of in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leaves_of(total: Tensor) -> list[Tensor]:
    """Return what a scalar's graph begins at: weights, and outputs or embeddings that were made to need a gradient."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [following for following, _ in node.next_functions]
    return found
