"""Switches and rules of bitsandbytes (written against 0.48 to 0.50) that its documentation does not name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
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


def rule_for_fused_rows(layer: nn.Module) -> Callable[[int], bool] | None:
    """Return bitsandbytes' own rule for a 4-bit layer on CUDA: with which row counts its product is one kernel.

    None for any other layer. Before 0.50 only one row was.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(layer, library.nn.Linear4bit) or _device_of(layer).type != "cuda":
        return None
    try:
        from bitsandbytes.backends.cuda import ops

        rule, most = ops._gemm_4bit_use_custom_fn, ops._gemm_4bit_custom_max_m
    except (ImportError, AttributeError):
        return lambda rows: rows == 1
    device, dtype = _device_of(layer).index, layer.compute_dtype
    aligned = layer.in_features % layer.weight.blocksize == 0

    def fused(rows: int) -> bool:
        return aligned and rows <= most and bool(rule(device, dtype, rows, layer.out_features, layer.in_features))

    return fused


def _device_of(layer: Any) -> torch.device:
    device: torch.device = layer.weight.device
    return device
