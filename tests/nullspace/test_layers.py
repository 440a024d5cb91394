"""What is held, what is refused, and that no trained parameter is left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nspo_lightning.nullspace import plan_layers
from nspo_lightning.nullspace.layers import matches

peft = pytest.importorskip("peft")


def llama(**options) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"vocab_size": 32, "tie_word_embeddings": False} | options)))


def lora(model: nn.Module | None = None, **options) -> nn.Module:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"]} | options
    return peft.get_peft_model(model or llama(), peft.LoraConfig(**settings))


def refused(model: nn.Module, **options) -> str:
    return "\n".join(str(refusal) for refusal in plan_layers(model, **options).refusals)


def covered(plan) -> set[int]:
    found = {id(r.parameter) for r in plan.refusals} | {id(layer.matrix) for layer in plan.layers}
    return found | {id(layer.output) for layer in plan.layers if layer.output is not None}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.1}])
def test_vanilla_adapters_are_held_with_their_scale(options):
    plan = plan_layers(lora(lora_alpha=8, **options))
    assert [layer.name.rpartition(".")[2] for layer in plan.layers] == ["q_proj", "down_proj"]
    assert not plan.refusals
    assert plan.layers[0].scale == pytest.approx(8 / 2**0.5 if options.get("use_rslora") else 4)
    assert [layer.width for layer in plan.layers] == [16, 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA rescales whole rows"),
        ({"modules_to_save": ["lm_head"]}, "Drop `modules_to_save`"),
        ({"lora_bias": True}, r"lora_B\.default\.bias: a trained bias"),
        ({"bias": "all"}, "a trained bias|cannot be projected"),
        ({"init_lora_weights": "pissa"}, "Merge the adapter into its base first"),
        ({"target_modules": ["embed_tokens"]}, "an embedding adapter moves the inputs of every layer"),
        ({"trainable_token_indices": [1, 2]}, "Drop `trainable_token_indices`"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "LoRA variant ALora"),
    ],
)
def test_what_would_move_protected_outputs_is_refused_with_the_way_out(options, message):
    model = lora(llama(attention_bias=True) if options.get("bias") else llama(), **options)
    plan = plan_layers(model)
    text = refused(model)
    import re

    assert re.search(message, text), text
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert covered(plan) == trained  # nothing is left out


def test_an_adapter_with_nonzero_b_needs_a_merge_a_frozen_b_or_a_resume():
    model = lora()
    up = next(p for name, p in model.named_parameters() if "lora_B" in name)
    nn.init.constant_(up, math.nan)  # no number compares as larger than zero with it
    assert "B is not zero" in refused(model)
    nn.init.normal_(up)
    assert "B is not zero" in refused(model)
    assert not refused(model, resumed=True)
    up.requires_grad_(False)
    assert not refused(model)


def test_adapters_of_convolutions_and_raw_parameters_are_refused():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

    assert "convolution" in refused(lora(Vision(), target_modules=["conv"]))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.w = nn.Parameter(torch.randn(4, 6, 8))

        def forward(self, x):
            return x

    model = peft.get_peft_model(Experts(), peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w"]))
    assert "mixture-of-experts" in refused(model)
    model = lora(target_modules=[], target_parameters=["embed_tokens.weight"])
    assert "raw parameter" in refused(model)  # a table that is looked up in is no linear map


def test_full_weights_of_linear_layers_and_conv1d_are_held():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3), nn.Linear(3, 2))
    plan = plan_layers(model)
    assert [(layer.name, layer.kind, layer.width) for layer in plan.layers] == [("0", "dense", 4), ("2", "dense", 3)]
    assert [r.name for r in plan.refusals] == ["1.weight", "1.bias", "2.bias"]
    assert "a trained scale" in str(plan.refusals[0])

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    kinds = {layer.name: (layer.kind, layer.width) for layer in plan_layers(gpt2).layers}
    assert kinds["transformer.h.0.mlp.c_proj"] == ("dense_transposed", 32)
    assert "lm_head" not in kinds  # tied to the embedding


def test_tied_weights_are_refused_by_both_names():
    model = llama(tie_word_embeddings=True)
    text = refused(model)
    assert "lm_head.weight" in text
    assert "Untie the weights" in text


def test_layers_outside_the_targets_are_reported_unless_another_callback_holds_them():
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False)})
    plan = plan_layers(model, ["a"])
    assert [layer.name for layer in plan.layers] == ["a"]
    assert "b.weight: it is trained but lies outside `target_modules`" in str(plan.refusals[0])
    assert not plan_layers(model, ["a"], covered_elsewhere=frozenset({id(model["b"].weight)})).refusals


@pytest.mark.parametrize(
    ("targets", "name", "expected"),
    [
        (None, "x.y", True),
        (r".*\.q_proj", "layers.0.q_proj", True),
        (r"q_proj", "layers.0.q_proj", False),
        (["q_proj"], "layers.0.q_proj", True),
        (["proj"], "layers.0.q_proj", False),
        (["encoder"], "encoder.layers.0.mlp", True),
        (["layers.0"], "encoder.layers.0.mlp", True),
    ],
)
def test_target_modules(targets, name, expected):
    assert matches(name, targets) is expected


def test_several_adapters_are_told_apart():
    model = lora()
    assert isinstance(model, peft.PeftModel)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    names = [layer.name for layer in plan_layers(model).layers]
    assert any(name.endswith("q_proj[default]") for name in names)
    assert any(name.endswith("q_proj[second]") for name in names)
