"""Switches of bitsandbytes (written against 0.48 to 0.50) that its documentation does not name."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

_REPACKING = "support_avx512bf16_for_cpu"
_MISSING_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"


def keep_4bit_exact(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in a model, if it has any, on one arithmetic in training and sampling.

    On CPUs with AVX512-BF16 a 4-bit layer repacks itself at its first call in eval mode: from then on it computes in
    bfloat16, with rounded quantisation constants, and hands no gradient to its input, in train mode too. A policy that
    samples between two updates would silently lose its gradients.
    """
    layers: list[Any] = [module for module in model.modules() if _REPACKING in vars(module)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def hide_missing_kernel() -> None:
    """Silence the report of an optional CPU kernel that is missing, and that `keep_4bit_exact` would not let run.

    To be called before bitsandbytes is imported, which PEFT does too.
    """
    logging.getLogger(_MISSING_KERNEL_LOGGER).setLevel(logging.CRITICAL)
