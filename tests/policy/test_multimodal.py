"""A model that sees pictures too, trained on text: what text never reaches is left out and named, the rest is held."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_jobs import datamodule, module
from tiny_jobs import trainer as job
from tiny_policies import largest_change, logits
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings

IDS = torch.arange(10, 50).view(4, 10)
OTHER = torch.arange(60, 124).view(8, 8)


@pytest.fixture(scope="session")
def tiny_gemma3(tokenizer, tmp_path_factory):
    """A random Gemma 3 with a vision tower."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("tiny_gemma3")
    words = len(tokenizer)
    text = {
        "vocab_size": words + 8,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "sliding_window": 64,
        "initializer_range": 0.15,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=words,
        boi_token_index=words + 1,
        eoi_token_index=words + 2,
        eos_token_id=tokenizer.eos_token_id,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(path: Any, lora: LoraSettings | None) -> PolicySettings:
    return PolicySettings(path=str(path), quantization="none", dtype="float32", lora=lora)


@pytest.mark.parametrize(
    "lora",
    [LoraSettings(r=4), LoraSettings(r=4, target_modules=["q_proj", "v_proj", "fc1"]), None],
    ids=["all-linear", "names", "all weights"],
)
def test_text_trains_what_it_reaches_and_calibration_text_stays(tiny_gemma3, tmp_path, lora):
    base = AutoModelForCausalLM.from_pretrained(tiny_gemma3)
    policy = module(tiny_gemma3, policy=settings(tiny_gemma3, lora))
    callback = NullSpaceProjection(
        calibration=[{"input_ids": IDS}],
        criterion="energy",
        threshold=0.0,
        cache_dir=None,
        unprotected="error" if lora is not None else "freeze",
    )
    with pytest.warns(UserWarning, match=r"vision_tower.*multi_modal_projector|multi_modal_projector.*vision_tower"):
        job(tmp_path, steps=4, callbacks=[callback]).fit(policy, datamodule())
    trained = policy.require_policy()
    assert largest_change(logits(trained, OTHER), logits(base, OTHER)) > 1e-2
    assert largest_change(logits(trained, IDS), logits(base, IDS)) < 1e-5
    assert callback.calibration is not None
    assert callback.calibration.layer_names()
    assert all("language_model" in name for name in callback.calibration.layer_names())
    if lora is None:
        return
    policy.save_adapter(tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, OTHER), logits(trained, OTHER))
    assert not any("vision" in name for name, _ in loaded.named_parameters() if "lora_" in name)
    assert "vision_tower" in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["exclude_modules"]


def test_an_adapter_of_the_vision_tower_alone_is_refused(tiny_gemma3):
    with pytest.raises(PolicyError, match="policy.lora"), pytest.warns(UserWarning, match="vision_tower"):
        load_policy(settings(tiny_gemma3, LoraSettings(r=4, target_modules=["fc1"])), torch.device("cpu"))


def test_a_model_of_text_alone_is_adapted_whole(tiny_llama, recwarn):
    policy: Any = load_policy(settings(tiny_llama, LoraSettings(r=4)), torch.device("cpu"))
    assert policy.peft_config["default"].exclude_modules is None
    assert not [str(w.message) for w in recwarn if "text" in str(w.message)]
