"""Names of transformers that have no public form. If one is gone, see `modeling_utils` and `configuration_utils`."""

from __future__ import annotations

import torch
from tiny_policies import tiny_base

from nspo_lightning.compat.transformers import attention_named, checkpoint_wrapped, gguf_architectures, without_gguf_


def test_the_attention_name_is_what_layers_ask_for_at_each_call():
    """If this fails: where do attention layers look `ALL_ATTENTION_FUNCTIONS` up, if not `_attn_implementation`?"""
    from transformers import AttentionInterface

    model, seen = tiny_base("llama"), []

    def recording(module, query, key, value, attention_mask, **_):
        seen.append(module.layer_idx)
        return query.transpose(1, 2), None

    AttentionInterface.register("recorded", recording)
    before = model.config._attn_implementation
    with attention_named(model.config, "recorded"):
        model(input_ids=torch.tensor([[5, 6]]))
    assert seen == [0, 1]
    assert model.config._attn_implementation == before
    model(input_ids=torch.tensor([[5, 6]]))
    assert seen == [0, 1]


def test_checkpointed_layers_run_through_the_wrapped_function():
    """If this fails: which attribute does `gradient_checkpointing_enable` set on layers now?"""
    model, runs = tiny_base("llama").train(), []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    kept = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]

    def wrap(checkpoint):
        def run(function, *args, **kwargs):
            runs.append(function)
            return checkpoint(function, *args, **kwargs)

        return run

    with checkpoint_wrapped(model, wrap):
        model(input_ids=torch.tensor([[5, 6]]))
    assert len(runs) == model.config.num_hidden_layers
    model(input_ids=torch.tensor([[5, 6]]))
    assert len(runs) == model.config.num_hidden_layers
    assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == kept


def test_the_architectures_of_gguf_files_are_listed():
    """If this fails: which table does `load_gguf_checkpoint` look an architecture up in?"""
    known = gguf_architectures()
    assert {"llama", "qwen2", "qwen3", "gemma3", "phi3"} <= set(known)
    assert not {"general", "tokenizer"} & set(known)


def test_a_model_marked_as_gguf_can_be_saved_again(tmp_path):
    """If this fails: what makes `save_pretrained` and `from_pretrained` take a model for a quantised one?"""
    from transformers import AutoConfig, GgufConfig

    model = tiny_base("llama")
    model.config.quantization_config, model.is_quantized = GgufConfig(), True
    without_gguf_(model)
    model.save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
