"""Switches of bitsandbytes. If one is gone, see `bitsandbytes/nn/modules.py` and `bitsandbytes/backends/cpu/ops.py`."""

from __future__ import annotations

import importlib
import logging

import bitsandbytes
import pytest
import torch
from torch import nn

from nspo_lightning.compat import bitsandbytes as compat
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


@pytest.fixture
def cuda_ops(monkeypatch):
    """bitsandbytes' module for CUDA, importable without: one name of torch's is only there with it."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(compat, "_device_of", lambda layer: torch.device("cuda", 0))
    return importlib.import_module("bitsandbytes.backends.cuda.ops")


def test_the_rule_for_fused_rows_is_the_librarys_own(monkeypatch, cuda_ops):
    """On an H100: 4 rows in any layer of a 7B model, 48 in its widest, 32 in its narrowest."""
    monkeypatch.setattr(cuda_ops, "_gpu_dispatch_props", lambda device: (132, 9, 0))
    cuda_ops._gemm_4bit_use_custom_fn.cache_clear()
    most = []
    for out_features, in_features in ((18944, 3584), (3584, 3584), (3584, 18944), (512, 3584)):
        layer = bitsandbytes.nn.Linear4bit(in_features, out_features, compute_dtype=torch.bfloat16, device="meta")
        fused = compat.rule_for_fused_rows(layer)
        assert fused is not None
        most.append(max(rows for rows in range(1, 5000) if fused(rows)))
        assert all(map(fused, range(1, most[-1] + 1)))
    assert most == [48, 7, 5, 32]
    cuda_ops._gemm_4bit_use_custom_fn.cache_clear()


def test_only_4bit_layers_on_cuda_have_such_a_rule(monkeypatch, cuda_ops):
    four_bit = bitsandbytes.nn.Linear4bit(64, 64)
    monkeypatch.delattr(cuda_ops, "_gemm_4bit_use_custom_fn")
    before = compat.rule_for_fused_rows(four_bit)
    assert before is not None
    assert [before(rows) for rows in (1, 2)] == [True, False], "before 0.50: one row"
    assert compat.rule_for_fused_rows(nn.Linear(64, 64)) is None
    monkeypatch.setattr(compat, "_device_of", lambda layer: layer.weight.device)
    assert compat.rule_for_fused_rows(four_bit) is None
