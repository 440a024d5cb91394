"""Directions of the weights themselves: what is protected where no text is asked (``subspace: weights``).

OPLoRA (arXiv 2510.13003) and its like keep updates out of the leading singular directions of the pretrained weights.
Here it is the control for the choice of directions: as many are protected as the text's spectrum says, but those that
the weights amplify most, not those that general text uses. On the input side alone, as everything else here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.shapes import base_of, input_width, is_conv1d, weight_of

_CHUNK = 1024


@torch.no_grad()
def weight_directions(modules: Sequence[nn.Module]) -> Tensor:
    """Return the right singular vectors of weights that read one input, stacked on one another.

    Packed (4-bit) weights are read by what they make of unit vectors, so they need no unpacking of their own.

    Args:
        modules: The layers, adapted or not.

    Returns:
        Shape ``(width, width)``, float64, orthonormal columns, the largest singular value first. Behind the weights'
        rank (a down projection has fewer outputs than inputs) they are any directions that the weights don't see.

    Raises:
        ValueError: If one of them is not a linear layer.
    """
    gram: Tensor | None = None
    for layer in dict.fromkeys(map(base_of, modules)):
        if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
            raise ValueError(
                f"subspace='weights' needs linear layers, and a {type(layer).__name__} is none. Leave it out "
                "(`target_modules`), or choose subspace='null'."
            )
        weight = weight_of(layer)
        assert weight is not None  # a linear layer has one
        if weight.dtype.is_floating_point:
            columns = ranks.full_tensor(weight.detach()).to(torch.float64)
            columns = columns if is_conv1d(layer) else columns.mT
        else:
            columns = _columns(layer, weight.device)
        gram = columns @ columns.mT if gram is None else gram + columns @ columns.mT
    if gram is None:
        raise ValueError("subspace='weights' needs at least one layer.")
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)


def _columns(layer: nn.Module, device: torch.device) -> Tensor:
    """Return what a layer makes of unit vectors, shape ``(width, out)``, float64, without its bias.

    The bias is taken away, not subtracted: one of 100 in 16 bits leaves nothing of weights of 0.02.
    """
    units = torch.eye(input_width(layer), device=device)
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    if bias is not None:
        layer.register_parameter("bias", None)
    try:
        parts = [units[start : start + _CHUNK] for start in range(0, len(units), _CHUNK)]
        return torch.cat([layer(part).to(torch.float64) for part in parts])
    finally:
        if bias is not None:
            layer.register_parameter("bias", bias)
