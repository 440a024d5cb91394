"""One loss, many micro-batches: memory of the largest micro-batch, meaning of a single backward pass.

Lightning's automatic optimization wants one scalar whose ``backward()`` makes the gradients. `accumulated_loss`
returns such a scalar, but has run forward *and* backward of each micro-batch already and kept only the sum of
gradients (as large as the trainable parameters, an adapter's). Its backward hands them to the parameters, times the
incoming gradient. Accumulation, gradient scaling, DDP's hooks, clipping and every callback see an ordinary backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


class _GradientsInForward(torch.autograd.Function):
    """Sum losses and gradients in the forward pass; hand the gradients out in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        chunks: Iterable[Any],
        loss_fn: Callable[[Any], Tensor],
        loss_scale: float,
        *parameters: Tensor,
    ) -> Tensor:
        gradients: list[Tensor | None] = [None] * len(parameters)
        total = torch.zeros((), device=parameters[0].device)
        for chunk in chunks:
            with torch.enable_grad():
                loss = loss_fn(chunk)
                total += loss.detach()
                scaled = loss * loss_scale
                del loss
            for i, new in enumerate(torch.autograd.grad(scaled, parameters, allow_unused=True)):
                so_far = gradients[i]
                if new is not None:
                    gradients[i] = new if so_far is None else so_far + new
            del scaled
        ctx.unused = [gradient is None for gradient in gradients]
        ctx.loss_scale = loss_scale
        ctx.save_for_backward(*[gradient for gradient in gradients if gradient is not None])
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        factor = upstream[0] / ctx.loss_scale
        return (None, None, None, *[None if unused else next(saved) * factor for unused in ctx.unused])


def accumulated_loss(
    parameters: Sequence[Tensor],
    chunks: Iterable[Chunk],
    loss_fn: Callable[[Chunk], Tensor],
    loss_scale: float = 1.0,
) -> Tensor:
    """Sum the losses of all chunks into one scalar with a gradient, holding one chunk's graph at a time.

    Args:
        parameters: The trainable parameters, all on one device.
        chunks: Micro-batches; consumed lazily.
        loss_fn: Maps a chunk to its share of the loss, a scalar with gradient.
        loss_scale: Factor on each loss before its backward pass, undone afterwards: the gradient scaler's current
            scale under float16, so that small gradients do not underflow inside. It changes no result otherwise.

    Returns:
        Scalar, float32: the sum of the chunk losses. Parameters that no chunk used get no gradient.

    Raises:
        ValueError: If there is no parameter, or one needs no gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor(2.0))
        >>> loss = accumulated_loss([weight], [1.0, 3.0], lambda factor: factor * weight**2)
        >>> loss.backward()
        >>> loss.item(), weight.grad.item()
        (16.0, 16.0)
    """
    parameters = list(parameters)
    if not parameters or not all(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "`accumulated_loss` needs at least one parameter, and only parameters that require a gradient, got "
            f"{len(parameters)} of which {sum(p.requires_grad for p in parameters)} do. Pass the trainable ones only."
        )
    if torch.is_autocast_enabled(parameters[0].device.type):
        # Casts cached by an earlier pass without gradients would silently cut the parameters off.
        torch.clear_autocast_cache()
    result: Tensor = _GradientsInForward.apply(  # type: ignore[no-untyped-call]
        chunks, loss_fn, loss_scale, *parameters
    )
    return result
