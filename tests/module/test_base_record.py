"""An adapter is measured on the base that it was trained on, and on no other."""

from __future__ import annotations

import pytest
import torch
from tiny_jobs import module

from nspo_lightning.policy.base_record import RECORD
from nspo_lightning.policy.settings import PolicyError

CPU = torch.device("cpu")


def measured(path, folder, quantization):
    policy = module(path, quantization=quantization)
    policy.adapter_folder = folder
    policy.load(CPU)
    return policy


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """The folder of an adapter on a base in 4 bits."""
    trained = module(tiny_llama, quantization="nf4")
    trained.load(CPU)
    trained.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_another_precision_is_refused_by_name(tiny_llama, adapter):
    assert measured(tiny_llama, adapter, "nf4").policy is not None
    with pytest.raises(PolicyError, match=r"trained on another base.*`policy.quantization` 'nf4' there, 'none' here"):
        measured(tiny_llama, adapter, "none")


def test_another_model_is_refused_by_name(tiny_qwen2, adapter):
    with pytest.raises(PolicyError, match=r"trained on another base.*tiny_llama.*there, .*tiny_qwen2.*here"):
        measured(tiny_qwen2, adapter, "nf4")


def test_an_adapter_that_does_not_say_is_used_with_a_warning(tiny_llama, adapter):
    (adapter / RECORD).unlink()
    with pytest.warns(UserWarning, match=r"does not say in which precision.*tiny_llama.*`policy.quantization: none`"):
        measured(tiny_llama, adapter, "none")
