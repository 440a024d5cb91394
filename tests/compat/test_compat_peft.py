"""Names that PEFT gives to parameters. If one has changed, see its `tuners/lora/layer.py` and `save_and_load.py`."""

from __future__ import annotations

from safetensors.torch import load_file
from tiny_policies import tiny_base, tiny_policy

from nspo_lightning.compat.peft import DOWN, MODEL_PREFIX, UP, is_lora_parameter, name_in_base, name_in_file


def test_adapter_parameters_are_told_by_name_and_the_rest_is_the_base():
    """If this fails: what stands around a wrapped model's names, and what do LoRA's own parameters begin with?"""
    policy = tiny_policy("llama")
    names = dict(policy.named_parameters())
    assert {name for name in names if is_lora_parameter(name)} == {n for n, p in names.items() if p.requires_grad}
    assert {name_in_base(name) for name in names if not is_lora_parameter(name)} == {
        name for name, _ in tiny_base("llama").named_parameters()
    }


def test_adapter_parameters_end_alike_in_memory_and_in_the_file(tmp_path):
    """If this fails: how are A and B of a layer called, with the adapter's name and, in the file, without?"""
    policy = tiny_policy("llama")
    mine = {name for name in dict(policy.named_parameters()) if is_lora_parameter(name)}
    assert all(name.startswith(MODEL_PREFIX) and name.endswith((DOWN, UP)) for name in mine)
    assert {name.removesuffix(DOWN) + UP for name in mine if name.endswith(DOWN)} == {n for n in mine if n.endswith(UP)}
    policy.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {name_in_file(name) for name in mine}
