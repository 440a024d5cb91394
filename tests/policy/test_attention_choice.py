"""A model is loaded with the attention that was asked for, with eager attention where it has no SDPA, or refused."""

from __future__ import annotations

import warnings

import pytest
import tiny_jobs
import torch
import transformers
from transformers import AutoModelForCausalLM

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.policy.loading import load_base
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.sharing import can_share_prompts

WITHOUT_SDPA = {
    "bloom": lambda size: transformers.BloomConfig(vocab_size=size, hidden_size=32, n_layer=1, n_head=2),
    "mpt": lambda size: transformers.MptConfig(vocab_size=size, d_model=32, n_layers=1, n_heads=2),
    "gemma2": lambda size: transformers.Gemma2Config(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    ),
}


@pytest.fixture(scope="module", params=WITHOUT_SDPA)
def folder(request, tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = WITHOUT_SDPA[request.param](len(tokenizer))
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return str(made)


def settings(folder, **given):
    return PolicySettings(path=folder, quantization="none", dtype="float32", lora=LoraSettings(r=2), **given)


def attention(model):
    return model.config._attn_implementation


def test_without_sdpa_it_is_eager_and_said_and_null_is_nobodys_choice(folder):
    with pytest.warns(UserWarning, match="no SDPA attention for.*eager attention is used") as said:
        assert attention(load_base(settings(folder), torch.device("cpu"))) == "eager"
    assert len([warning for warning in said if "SDPA" in str(warning.message)]) == 1
    own = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SDPA.*")
        for asked, given in ((None, attention(own)), ("eager", "eager")):
            model = load_base(settings(folder, attn_implementation=asked), torch.device("cpu"))
            assert attention(model) == given


def test_it_trains_in_the_null_space(folder, tmp_path):
    projection = NullSpaceProjection(criterion="rank", threshold=0.5)
    module = tiny_jobs.module(folder, policy=settings(folder, attn_implementation=None))
    tiny_jobs.trainer(tmp_path, steps=2, callbacks=[projection]).fit(module, tiny_jobs.datamodule())
    assert max(projection.certificate().values()) < 1e-5


def test_null_is_transformers_choice_where_there_is_sdpa(tiny_llama):
    model = load_base(settings(str(tiny_llama), attn_implementation=None), torch.device("cpu"))
    assert attention(model) == attention(AutoModelForCausalLM.from_pretrained(tiny_llama)) == "sdpa"


@pytest.mark.parametrize("asked", ["flash_attention_2", "nonsense"])
def test_another_attention_is_refused_with_its_own_cure(tiny_llama, asked):
    with pytest.raises(
        PolicyError, match=rf"`policy.attn_implementation` is '{asked}'(.|\n)*Set `sdpa`, `eager`, or null"
    ):
        load_base(settings(str(tiny_llama), attn_implementation=asked), torch.device("cpu"))


@pytest.mark.parametrize("scale", [1, 3])
def test_attention_of_its_own_shares_no_prompts_however_little_it_matters(scale):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WITHOUT_SDPA["bloom"](97), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        assert not can_share_prompts(model)
