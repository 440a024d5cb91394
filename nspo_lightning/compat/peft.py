"""How PEFT (written against 0.19 to 0.21) names the modules and parameters of a model that it adapts.

The names are part of its file format and of our checkpoints, but no constants of PEFT.
"""

from __future__ import annotations

MODEL_PREFIX = "base_model.model."
"""Stands before every name of the adapted model."""
WRAPPED = "base_layer."
"""Stands between an adapted layer's name and those of its own parameters."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""Stand behind a layer's name: A and B of its adapter."""


def is_lora_parameter(name: str) -> bool:
    """Tell whether a parameter's name is that of a LoRA adapter."""
    return "lora_" in name


def name_in_base(name: str) -> str:
    """Return the name that a parameter of an adapted model has without PEFT."""
    return name.replace(MODEL_PREFIX, "").replace(WRAPPED, "")


def name_in_file(name: str) -> str:
    """Return the name that an adapter's parameter has in `adapter_model.safetensors`."""
    return name.replace(".default", "")
