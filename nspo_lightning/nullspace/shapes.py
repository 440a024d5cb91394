"""What a module looks like from outside: its weight, its width, and whether it is one of PEFT's LoRA layers.

Neither peft nor transformers is imported: their layers are read by the attributes that make them what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA layer: one bias-free linear map A and one B for each adapter name."""

    module: nn.Module
    down: nn.ModuleDict
    """Adapter name -> A (``lora_A``)."""
    up: nn.ModuleDict
    """Adapter name -> B (``lora_B``)."""
    scaling: Mapping[str, float]
    """Adapter name -> s."""
    doras: frozenset[str]
    """Names of the adapters that use DoRA."""
    variants: Mapping[str, object]
    """Adapter name -> what stands in for the plain s B A, where something does."""
    raw_parameter: str | None
    """Name of the parameter that is adapted where that is no layer's weight (mixtures of experts)."""
    in_features: int | None
    """Width of the layer's input, where the layer says it."""
    experts: int
    """Experts whose adapters lie side by side in A and B; 1 for a layer's own weight."""

    @classmethod
    def of(cls, module: nn.Module) -> Adapter | None:
        """Return a module as an adapter, None if it is none."""
        children, own = dict(module.named_children()), vars(module)
        down, up = children.get("lora_A"), children.get("lora_B")
        if not isinstance(down, nn.ModuleDict) or not isinstance(up, nn.ModuleDict):
            return None
        magnitudes = children.get("lora_magnitude_vector")
        doras = [name for name, used in own.get("use_dora", {}).items() if used]
        return cls(
            module=module,
            down=down,
            up=up,
            scaling={name: float(scale) for name, scale in own.get("scaling", {}).items()},
            doras=frozenset(doras + (list(magnitudes) if isinstance(magnitudes, nn.ModuleDict) else [])),
            variants=own.get("lora_variant", {}),
            raw_parameter=own.get("parameter_name"),
            in_features=own.get("in_features"),
            experts=int(own.get("num_experts", 1)),
        )

    def pairs(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Yield adapter name, A and B."""
        yield from ((name, self.down[name], self.up[name]) for name in self.down if name in self.up)


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter (or several, one around the other) wraps; the module itself without any."""
    base = dict(module.named_children()).get("base_layer")
    return module if base is None else base_of(base)


def weight_of(module: nn.Module) -> Tensor | None:
    """Return a module's weight (a parameter, or computed by a parametrization), None if it has none."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's Conv1D: a linear layer with a transposed weight, of shape (in, out)."""
    loaded: Any = sys.modules.get("transformers.pytorch_utils")  # not imported: then there is no such module
    return loaded is not None and isinstance(module, loaded.Conv1D)


def input_width(module: nn.Module) -> int:
    """Return the number of input features of a linear layer, adapted or not."""
    for attribute in ("in_features", "nx"):
        if attribute in vars(module):
            return int(vars(module)[attribute])
    weight = weight_of(module)
    if weight is None:
        raise TypeError(f"A {type(module).__name__} has no weight, so its input's width is not known.")
    return weight.shape[0] if is_conv1d(module) else weight.shape[1]
