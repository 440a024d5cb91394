"""Normalisations that are to stay as they are do, whoever calls `train()` and whenever."""

from __future__ import annotations

import torch
from torch import nn

from nspo_lightning.callbacks.null_space.watch import StillStatistics


def test_statistics_do_not_move_in_the_first_batch_after_a_call_of_train() -> None:
    norm = nn.BatchNorm1d(2)
    module = nn.Sequential(nn.Linear(2, 2), norm).eval()
    still = StillStatistics(module, "freeze")
    for _ in range(2):
        module.train()
        still.keep(module)
        assert [part.training for part in module] == [True, False]
        module(torch.randn(8, 2))
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0, 0.0]
