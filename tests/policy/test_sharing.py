import warnings

import pytest
import torch
import transformers
from tiny_policies import COMMON, tiny_base, tiny_policy
from torch import nn

from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.policy.sharing import can_share_prompts, group_attention


def test_models_that_share_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_share_prompts(tiny_base("llama"))


def test_one_warning_says_why_a_model_cannot_share():
    model = tiny_base("falcon")
    with pytest.warns(UserWarning, match="FalconForCausalLM cannot share a prompt"):
        assert not can_share_prompts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not can_share_prompts(model)


def test_a_window_that_is_applied_in_an_unknown_way_is_not_trusted():
    config = transformers.MixtralConfig(**COMMON, num_local_experts=2, sliding_window=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match="sets sliding_window"):
        assert not can_share_prompts(model)


def test_a_wrong_trial_result_is_noticed():
    model = tiny_base("llama")
    attention = model.model.layers[0].self_attn
    original = attention.forward

    def biased(hidden_states, **kwargs):
        out, weights = original(hidden_states, **kwargs)
        return (out * 2 if "group_pass" in kwargs else out), weights

    attention.forward = biased
    with pytest.warns(UserWarning, match="a trial gave other logits"):
        assert not can_share_prompts(model)


def test_the_attention_is_put_back_also_after_an_error():
    model = tiny_base("llama")
    before = model.config._attn_implementation
    inside = []

    def fail():
        with group_attention(model):
            inside.append(model.config._attn_implementation)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert inside == ["nspo_group"]
    assert model.config._attn_implementation == before


def test_evaluation_mode_restores_a_mix_of_modes():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    net.train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    with evaluation_mode(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize(("name", "splits"), [("llama", True), ("gemma2", True), ("gpt2", True), ("cohere", False)])
def test_heads_beyond_a_matrix_and_a_cap_are_taken_whole(name, splits):
    policy = tiny_policy(name)
    if splits:
        parts = policy_parts(policy)
    else:
        with pytest.warns(UserWarning, match="does more than a linear head"):
            parts = policy_parts(policy)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states, _ = parts.decode(ids, use_cache=False)
        torch.testing.assert_close(parts.head(states), policy(input_ids=ids).logits)
    assert (parts.head_module is not None) == splits


def test_models_without_a_head_are_refused():
    encoder = transformers.AutoModel.from_config(transformers.LlamaConfig(**COMMON))
    with pytest.raises(TypeError, match="causal language model with an output embedding"):
        policy_parts(encoder)
