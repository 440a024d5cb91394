"""Switches of bitsandbytes. If one is gone, see `bitsandbytes/nn/modules.py` and `bitsandbytes/backends/cpu/ops.py`."""

from __future__ import annotations

import importlib
import logging

import bitsandbytes
from torch import nn

from nspo_lightning.compat.bitsandbytes import hide_missing_kernel, keep_4bit_exact


def test_the_switch_against_repacking_is_on_every_4bit_layer():
    """If this fails: does `Linear4bit.forward` still repack in eval mode, and what turns it off?"""
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    assert "support_avx512bf16_for_cpu" in vars(layer)
    layer.support_avx512bf16_for_cpu = True
    keep_4bit_exact(nn.Sequential(nn.Linear(2, 2), layer))
    assert layer.support_avx512bf16_for_cpu is False


def test_the_missing_kernel_is_reported_by_the_logger_that_is_silenced():
    """If this fails: which module reports a missing CPU kernel?"""
    hide_missing_kernel()
    ops = importlib.import_module("bitsandbytes.backends.cpu.ops")
    assert isinstance(ops.logger, logging.Logger)
    assert not ops.logger.isEnabledFor(logging.ERROR)
