"""4-bit layers that compute with their weights in full, for as long as the policy is loaded.

bitsandbytes unpacks a 4-bit matrix again for each product, forward and backward. On a CPU that is most of the time of a
decoding step, and the base never changes: a copy that is made once serves sampling, scoring, gradients, calibration and
measuring alike. The copy holds the numbers that each product would unpack and multiplies them in the same way, so on a
CPU no bit of any result changes. It is no parameter: checkpoints, adapters, hooks and fingerprints know nothing of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.compat.host import free_memory
from nspo_lightning.compat.torch import memory_of, version_of
from nspo_lightning.policy.settings import PolicyError, PolicySettings

AT_MOST = 0.25
"""Share of the free main memory that `auto` takes for the copies: training's activations need more than these."""


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers."""
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


def dtype_of(layer: Any) -> torch.dtype:
    """Return the dtype that a linear layer, 4-bit or not, multiplies in."""
    weight = layer.weight
    return (layer.compute_dtype or weight.quant_state.dtype) if is_4bit(layer) else weight.dtype  # type: ignore[no-any-return]


def nbytes_of(layer: Any) -> int:
    """Return the bytes of a linear layer's weights in full."""
    shape = layer.weight.quant_state.shape if is_4bit(layer) else layer.weight.shape
    return int(shape[0] * shape[1] * dtype_of(layer).itemsize)


def unpacked(layer: Any) -> Tensor:
    """Return a 4-bit layer's weights in full, (out, in): those that it holds, or a new copy."""
    held = vars(layer).get("forward")
    if isinstance(held, HeldProduct):
        return held.weight()
    from bitsandbytes.functional import dequantize_4bit

    # bitsandbytes' product unpacks to the dtype that it computes in, whatever the state's.
    state = copy.copy(layer.weight.quant_state)
    state.dtype = dtype_of(layer)
    return dequantize_4bit(layer.weight.data, state)  # type: ignore[no-any-return]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a 4-bit layer computes: in its own dtype, handed back in that of its input."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


class HeldProduct:
    """Stands in for the forward of a 4-bit layer; unpacks anew if the layer's weights are replaced or changed."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._made_from: tuple[Any, ...] = ()
        self._weight: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the copy, shape (out, in)."""
        own = self.layer.weight
        now = (own.data_ptr(), version_of(own), own.device)
        if self._weight is None or now != self._made_from:
            vars(self.layer).pop("forward", None)  # so that it is unpacked, not asked of this
            try:
                with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
                    self._weight, self._made_from = unpacked(self.layer), now
            finally:
                vars(self.layer)["forward"] = self
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        return product(x, self.weight(), self.layer.bias)


def is_held(layer: nn.Module) -> bool:
    """Whether a 4-bit layer computes with a copy that it holds."""
    return isinstance(vars(layer).get("forward"), HeldProduct)


def hold_unpacked(policy: nn.Module, settings: PolicySettings) -> str:
    """Let a policy's 4-bit layers hold their weights in full; all ranks ask together, and do alike.

    Args:
        policy: The loaded policy, on its device.
        settings: `training_weights` is what was asked for. "auto" holds them on a CPU, where all processes' copies take
            a quarter of the free memory at most.

    Returns:
        One line for the log, empty where nothing was to be decided.

    Raises:
        PolicyError: If they were asked for and there is no room on this rank or another one.
    """
    layers, device = [one for one in policy.modules() if is_4bit(one)], next(policy.parameters()).device
    asked, on_cpu = settings.training_weights, device.type == "cpu"
    if not layers:
        idle = "`policy.training_weights: dequantized` changes nothing: no layer is in 4 bits."
        return idle if asked == "dequantized" else ""
    if asked == "quantized" or (asked == "auto" and not on_cpu):
        return ""
    memory, share = memory_of(device), AT_MOST if asked == "auto" else 1.0
    needed = sum(map(nbytes_of, layers)) * (ranks.world_size() if on_cpu else 1)
    free = free_memory() if on_cpu or memory is None else memory[0]
    found = f"unpacked they take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if ranks.any_rank(needed > share * free):
        if asked == "auto":
            return (
                f"4-bit weights are unpacked for each product, which is slow on a CPU (`policy.training_weights: "
                f"auto`): {found}, and a quarter of it may be taken. `dequantized` takes more."
            )
        raise PolicyError(
            f"`policy.training_weights: dequantized` finds no room here or on another rank: {found}. Set "
            "`policy.training_weights: quantized`, which needs none, or `auto`, which looks for itself."
        )
    for one in layers:
        HeldProduct(one).weight()
    return f"4-bit weights are kept unpacked, the same numbers (`policy.training_weights: {asked}`): {found}."
