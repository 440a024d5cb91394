"""Mixtures of experts: what is trained is held by outputs, and what is refused has a cure that works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_jobs import datamodule, module
from tiny_jobs import trainer as job
from transformers import AutoModelForCausalLM

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.policy.settings import LoraSettings, PolicySettings

IDS = torch.arange(10, 50).view(4, 10)
OTHER = torch.arange(60, 124).view(8, 8)
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda **options: transformers.Qwen3MoeConfig(
        **COMMON,
        **options,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": lambda **options: transformers.MixtralConfig(
        **COMMON, **options, intermediate_size=96, num_local_experts=4
    ),
}


@pytest.fixture(scope="session", params=CONFIGS)
def tiny_experts(request, tokenizer, tmp_path_factory):
    """A random mixture of experts."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp(request.param)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = CONFIGS[request.param](vocab_size=len(tokenizer), **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def moved(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def fit(path: Any, folder: Any, targets: Any, steps: int = 4, **options: Any) -> tuple[Any, NullSpaceProjection]:
    lora = None if targets is None else LoraSettings(r=4, target_modules=targets)
    settings = PolicySettings(path=str(path), quantization="none", dtype="float32", lora=lora)
    policy = module(path, policy=settings)
    callback = NullSpaceProjection(
        **{"calibration": [{"input_ids": IDS}], "criterion": "energy", "threshold": 0.0, "cache_dir": None} | options
    )
    job(folder, steps=steps, callbacks=[callback]).fit(policy, datamodule())
    return policy.require_policy(), callback


def check_held(path: Any, trained: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(path)
    assert moved(logits(trained, OTHER), logits(base, OTHER)) > 1e-2
    assert moved(logits(trained, IDS), logits(base, IDS)) < 1e-5


def test_adapters_of_experts_are_refused_with_names_that_train(tiny_experts, tmp_path):
    with pytest.raises(MisconfigurationException) as error:
        fit(tiny_experts, tmp_path, "all-linear")
    cure = "`target_modules: [q_proj, k_proj, v_proj, o_proj]`"
    assert cure in str(error.value)
    assert "unprotected='freeze'" in str(error.value)
    trained, callback = fit(tiny_experts, tmp_path, ["q_proj", "k_proj", "v_proj", "o_proj"])
    check_held(tiny_experts, trained)
    assert callback.verification is not None
    assert callback.verification.layers == 8


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_experts_can_be_frozen(tiny_experts, tmp_path, targets):
    trained, callback = fit(tiny_experts, tmp_path, targets, unprotected="freeze")
    check_held(tiny_experts, trained)
    assert callback.verification is not None
    assert callback.verification.layers >= 8
    assert not [name for name, p in trained.named_parameters() if ".mlp." in name and p.requires_grad]
