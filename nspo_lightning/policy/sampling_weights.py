"""Weights to sample with: a copy of the policy's linear maps in full, for as long as completions are drawn.

A 4-bit matrix is unpacked again for each product, and an adapter adds two products a layer. Where a step has a row a
completion, that is most of its time. Inside `SamplingWeights.in_place` the maps compute with a copy:

- dequantized: the 4-bit values in the compute dtype, the adapter beside them. The same function: bitsandbytes' own
  product unpacks to the same numbers. Layers that hold such a copy anyway (`unpacked.py`) need no other.
- merged: W + s B A, rounded to W's dtype. Nearly the same function: bfloat16 has 8 bits, so an update's entries below
  1/512 of their weight are lost. Only what is learnt from is drawn so, and corrected by the importance ratio. Added
  anew to the stored base each time and never subtracted, so nothing drifts.

The copy lives inside the block alone: making it takes less time than a few tokens, and training needs the memory. No
parameter and no module changes, so gradients, checkpoints, hooks and the reference know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.compat.torch import memory_of
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.unpacked import dtype_of, is_4bit, is_held, nbytes_of, product, unpacked

Mode = Literal["quantized", "dequantized", "merged"]

KEPT_FREE = 0.25
"""Share of a device's memory that `auto` leaves for keys and values, bases, and the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class _Map:
    """A linear map that gets a copy: `module` computes with it, made from the weight of `base` (often the same)."""

    module: Any
    base: Any

    def weight(self) -> Tensor:
        """Make the copy, shape (out, in)."""
        weight = unpacked(self.base) if is_4bit(self.base) else self.base.weight.detach()
        if self.module is self.base:
            return weight
        for name in self.module.active_adapters:
            if name in self.module.lora_A:
                weight = (self.module.get_delta_weight(name).float() + weight).to(dtype_of(self.base))
        return weight.T if self.module.fan_in_fan_out else weight

    def forward_with(self, weight: Tensor) -> Callable[..., Tensor]:
        """Return what the module computes with a copy."""
        in_4bit, bias, module, own = is_4bit(self.base), self.base.bias, self.module, self.module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if module is not self.base and module.disable_adapters:  # switched off since the copy was made
                return own(x, *args, **kwargs)  # type: ignore[no-any-return]
            # A 4-bit layer computes in its own dtype, and any other leaves that to autocast.
            return product(x, weight, bias) if in_4bit else F.linear(x, weight, bias)

        return forward


class SamplingWeights:
    """A policy's weights as they are sampled from.

    Args:
        policy: A PEFT model, or a plain causal language model.
        mode: Which copy; "quantized" = none.
    """

    def __init__(self, policy: nn.Module, mode: Mode) -> None:
        self.policy = policy
        self.mode = mode

    @property
    def nbytes(self) -> int:
        """Bytes of the copy: in x out of each map that has one, times the bytes of its dtype."""
        return sum(nbytes_of(one.base) for one in self._maps())

    @property
    def differ(self) -> bool:
        """Whether completions are drawn from another function than the one that is trained."""
        return self.mode == "merged"

    def exact(self) -> SamplingWeights:
        """Return weights of the trained function, for those who measure it and have no ratio that corrects rounding."""
        return SamplingWeights(self.policy, "dequantized") if self.differ else self

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with a fresh copy inside the block, whose place in memory is another one each time.

        Where the adapter is switched off, at the start or later on, it stays off.

        Raises:
            PolicyError: If the copy finds no room.
        """
        replaced: list[tuple[dict[str, Any], Any]] = []
        try:
            try:
                with torch.no_grad():
                    for one in self._maps():
                        with torch.autocast(one.base.weight.device.type, enabled=False):
                            forward = one.forward_with(one.weight())
                        attributes = vars(one.module)
                        replaced.append((attributes, attributes.get("forward")))
                        attributes["forward"] = forward
            except torch.OutOfMemoryError as error:
                memory = memory_of(next(self.policy.parameters()).device)
                raise PolicyError(_no_room(self.mode, self.nbytes, None if memory is None else memory[0])) from error
            yield
        finally:
            for attributes, before in replaced:
                del attributes["forward"]
                if before is not None:
                    attributes["forward"] = before

    def _maps(self) -> list[_Map]:
        if self.mode == "quantized":
            return []
        modules: list[Any] = list(self.policy.modules())
        adapted = [one for one in modules if self.mode == "merged" and _merges(one)]
        merged = [_Map(module=one, base=one.get_base_layer()) for one in adapted]
        inside = {id(one.base) for one in merged}
        plain = [
            _Map(module=one, base=one) for one in modules if id(one) not in inside and is_4bit(one) and not is_held(one)
        ]
        return [*merged, *plain]


def _merges(module: Any) -> bool:
    # Plain LoRA that is switched on, on layers whose forward is known; others keep their own, which is right as well.
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return False
    if module.lora_variant or any(module.lora_bias.values()):
        return False
    base = module.get_base_layer()
    return type(base) in {nn.Linear, Conv1D} or is_4bit(base)


def choose_sampling_weights(policy: nn.Module, settings: PolicySettings) -> tuple[SamplingWeights, str]:
    """Choose the weights to sample with; all ranks ask together, and choose alike.

    Args:
        policy: The loaded policy.
        settings: `sampling_weights` is what was asked for. "auto" is "merged" on a device that holds the copy with a
            quarter of its memory left, and "quantized" on others and on the CPU.

    Returns:
        The weights, and one line for the log, empty where nothing was to be decided.

    Raises:
        PolicyError: If there is no room on this rank or another one.
    """
    asked, device = settings.sampling_weights, next(policy.parameters()).device
    weights = SamplingWeights(policy, "merged" if asked == "auto" else asked)
    needed, memory = weights.nbytes, memory_of(device)
    if not needed:
        why = "there is no adapter to merge (`policy.lora: null`)" if asked == "merged" else "no layer is in 4 bits"
        idle = asked == "merged" or (asked == "dequantized" and not any(map(is_4bit, policy.modules())))
        note = f"`policy.sampling_weights: {asked}` changes nothing: {why}." if idle else ""
        return SamplingWeights(policy, "quantized"), note
    if memory is None:
        return SamplingWeights(policy, "quantized") if asked == "auto" else weights, ""
    free, total = memory
    reserve = KEPT_FREE * total if asked == "auto" else 0.0
    short = ranks.any_rank(free < needed + reserve)
    if asked != "auto":
        if short:
            raise PolicyError(_no_room(asked, needed, free))
        return weights, f"Sampling from {asked} weights: a copy of {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free."
    chosen: Mode = "quantized" if short else "merged"
    return SamplingWeights(policy, chosen), (
        f"Sampling from {chosen} weights (`policy.sampling_weights: auto`): a merged copy takes {needed / 1e9:.1f} GB, "
        f"{free / 1e9:.1f} GB are free, of which {reserve / 1e9:.1f} GB are kept for other things."
    )


def _no_room(mode: str, needed: int, free: int | None) -> str:
    found = "the device has less" if free is None else f"{free / 1e9:.1f} GB are free on this one"
    return (
        f"`policy.sampling_weights: {mode}` needs {needed / 1e9:.1f} GB ({needed:,} bytes) on each device for a copy "
        f"of the linear maps while completions are drawn, and {found}. Set `policy.sampling_weights: quantized`, which "
        "needs no copy, or `auto`, which looks for itself."
    )
