"""Names of transformers that have no public form. If one is gone, see `modeling_utils` and `configuration_utils`."""

from __future__ import annotations

import torch
from tiny_policies import tiny_base

from nspo_lightning.compat.transformers import attention_named, checkpoint_wrapped


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
