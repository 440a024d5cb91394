"""The bar of a model that is loaded counts its tensors, whatever transformers draws them with."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from nspo_lightning.policy import loading_progress as module
from nspo_lightning.policy.loading import load_base
from nspo_lightning.policy.loading_progress import loading_progress
from nspo_lightning.policy.settings import PolicySettings


@pytest.fixture
def told(monkeypatch):
    """What the bar was told: (rows, total)."""
    seen: list[tuple[int, int | None]] = []

    @contextmanager
    def shown(label, total=None, **_):
        yield lambda rows=1, *, note=None, total=None: seen.append((rows, total))

    monkeypatch.setattr(module, "rows_progress", shown)
    return seen


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_tensor_of_a_policy_is_counted(tiny_llama, told, quantization):
    with safe_open(tiny_llama / "model.safetensors", "pt") as file:
        number = len(list(file.keys()))
    settings = PolicySettings(path=str(tiny_llama), quantization=quantization, dtype="float32")
    with loading_progress("Loading the policy", visible=True):
        load_base(settings, torch.device("cpu"))
    assert told == [(0, number), *[(1, None)] * number]
    load_base(settings, torch.device("cpu"))
    assert len(told) == number + 1, "outside of the block nothing is told"


def test_bars_that_are_told_how_many_there_are_count_too(told):
    with loading_progress("Loading the policy", visible=True):
        with transformers_logging.tqdm(total=6, desc="Loading weights") as bar:
            bar.update(2)
            bar.set_postfix({"shard": 1})
        assert list(transformers_logging.tqdm([1, 2], desc="Writing", disable=True)) == [1, 2]
    assert told == [(0, 6), (2, None)]


def test_what_is_not_shown_leaves_transformers_bars_as_they_are(tiny_llama, told):
    with loading_progress("Loading the policy", visible=False):
        load_base(PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32"), torch.device("cpu"))
    assert not told
