"""Loading policies: both architectures of the recipes, 4-bit and not, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_policies import move_adapter_, save_llama
from transformers import AutoModelForCausalLM

from nspo_lightning.policy.chat_template import read_chat_template
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import check_4bit_widths, check_device, load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.tokenizer import load_tokenizer, stop_token_ids

CPU = torch.device("cpu")
SMALL_LORA = LoraSettings(r=4, alpha=8)


def settings(path, **kwargs):
    return PolicySettings(**{"path": str(path), "dtype": "float32", "lora": SMALL_LORA, **kwargs})


@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_qwen2"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_recipes_architectures_load_with_float32_adapters_on_all_linear_layers(checkpoint, quantization, request):
    policy = load_policy(settings(request.getfixturevalue(checkpoint), quantization=quantization), CPU)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trainable} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(p.dtype == torch.float32 for p in trainable.values())
    kinds = {type(m).__name__ for name, m in policy.named_modules() if name.endswith("q_proj.base_layer")}
    assert kinds == ({"Linear4bit"} if quantization == "nf4" else {"Linear"})


def test_qwen2_tokenizer_is_loaded_as_saved(tiny_qwen2):
    tokenizer = load_tokenizer(settings(tiny_qwen2))
    assert tokenizer.decode(tokenizer("How do I burn a log?").input_ids) == "How do I burn a log?"
    assert tokenizer.padding_side == "left"


def test_every_eos_id_stops(tiny_qwen2):
    policy = load_policy(settings(tiny_qwen2, quantization="none"), CPU)
    tokenizer = load_tokenizer(settings(tiny_qwen2))
    assert stop_token_ids(policy, tokenizer) == sorted({tokenizer.eos_token_id, tokenizer.pad_token_id})


def test_4bit_policy_keeps_its_gradients_after_sampling(tiny_llama):
    """On some CPUs a 4-bit layer that ran in eval mode hands no gradient to its input any more."""
    policy = load_policy(settings(tiny_llama, quantization="nf4"), CPU)
    ids = torch.randint(10, 300, (2, 6))
    first = next(p for name, p in policy.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name)

    def gradient():
        policy.train()
        policy.zero_grad()
        policy(input_ids=ids).logits.square().mean().backward()
        assert first.grad is not None
        return first.grad.clone()

    before = gradient()
    policy.eval()
    with torch.no_grad():
        policy(input_ids=ids)
    assert torch.equal(before, gradient())
    assert before.abs().max() > 0


def test_fingerprint_names_the_base_and_not_the_adapter(tiny_llama, tiny_qwen2):
    one = load_policy(settings(tiny_llama, quantization="none"), CPU)
    two = load_policy(settings(tiny_llama, quantization="none", lora=LoraSettings(r=8)), CPU)
    other = load_policy(settings(tiny_qwen2, quantization="none"), CPU)
    assert policy_fingerprint(one) == policy_fingerprint(two)
    assert policy_fingerprint(one) != policy_fingerprint(other)


def test_full_fine_tuning_without_lora(tiny_llama):
    policy = load_policy(settings(tiny_llama, quantization="none", lora=None), CPU)
    assert all(p.requires_grad for p in policy.parameters())


def test_gradient_checkpointing_trains(tiny_llama):
    policy = load_policy(settings(tiny_llama, quantization="nf4", gradient_checkpointing=True), CPU)
    policy.train()
    policy(input_ids=torch.randint(10, 300, (1, 5))).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters() if p.requires_grad)


def test_a_trained_adapter_is_refused_and_can_be_merged(tiny_llama, tmp_path):
    policy: Any = load_policy(settings(tiny_llama, quantization="none"), CPU)
    move_adapter_(policy, 0.05)
    adapter = str(tmp_path / "sft")
    policy.save_pretrained(adapter)
    load_tokenizer(settings(tiny_llama)).save_pretrained(adapter)
    with pytest.raises(PolicyError, match="its B is not zero.*merge_adapter"):
        load_policy(settings(tiny_llama, quantization="none", adapter=adapter), CPU)
    with pytest.raises(PolicyError, match="would round the adapter away"):
        load_policy(settings(tiny_llama, quantization="nf4", adapter=adapter, merge_adapter=True), CPU)
    merged = load_policy(settings(tiny_llama, quantization="none", adapter=adapter, merge_adapter=True), CPU)
    ids = torch.randint(10, 300, (1, 7))
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
    assert torch.allclose(merged(input_ids=ids).logits, reference(input_ids=ids).logits, atol=1e-4)
    assert all("lora_" in name for name, p in merged.named_parameters() if p.requires_grad)


def test_unknown_paths_are_named():
    with pytest.raises(PolicyError, match="found nothing at '/nowhere/model'"):
        load_tokenizer(settings("/nowhere/model"))
    with pytest.raises(PolicyError, match="nobody/nothing"):
        load_tokenizer(settings("nobody/nothing"))


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match="could not load the tokenizer"):
        load_tokenizer(settings(tmp_path / "empty"))


def test_a_missing_chat_template_is_asked_for(tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_llama)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="no chat template.*chat_template"):
        load_tokenizer(settings(tiny_llama, tokenizer=str(tmp_path)))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    given = load_tokenizer(settings(tiny_llama, tokenizer=str(tmp_path), chat_template=str(template)))
    assert given.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x>"


def test_a_chat_template_is_text_or_a_file(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + "{# long enough for no file name #}" * 20
    file = tmp_path / "template.jinja"
    file.write_text(template + "\u00fc", encoding="utf-8")
    assert read_chat_template(template) == template
    assert read_chat_template(str(file)) == template + "\u00fc"
    with pytest.raises(PolicyError, match=r"neither a Jinja template nor a file.*nothing\.jinja"):
        read_chat_template(str(tmp_path / "nothing.jinja"))


def test_widths_that_4bit_on_cpu_cannot_take_are_named(tokenizer, tmp_path):
    save_llama(tmp_path, tokenizer, intermediate_size=100)
    with pytest.raises(PolicyError, match=r"gate_proj' has 100 out-features.*multiples of 32.*quantization: none"):
        load_policy(settings(tmp_path, quantization="nf4"), CPU)
    check_4bit_widths(settings(tmp_path, quantization="nf4"), "cuda")
    load_policy(settings(tmp_path, quantization="none"), CPU)


def test_lora_targets_that_do_not_exist_are_named(tiny_llama):
    with pytest.raises(PolicyError, match="policy.lora"):
        load_policy(settings(tiny_llama, quantization="none", lora=LoraSettings(target_modules=["nothing"])), CPU)


def test_4bit_weights_cannot_be_trained_whole(tiny_llama):
    with pytest.raises(PolicyError, match="lora: null"):
        load_policy(settings(tiny_llama, quantization="nf4", lora=None), CPU)


@pytest.mark.parametrize(
    ("capability", "changes", "mend"),
    [
        ((5, 2), {"quantization": "nf4", "dtype": "float16"}, "policy.quantization: none"),
        ((7, 5), {"quantization": "nf4", "dtype": "bfloat16"}, "policy.dtype: float16"),
        ((7, 0), {"quantization": "none", "dtype": "bfloat16"}, "trainer.precision: 16-mixed"),
        ((6, 0), {"quantization": "nf4", "dtype": "float16"}, ""),
        ((5, 2), {"quantization": "none", "dtype": "float32"}, ""),
        ((8, 0), {"quantization": "nf4", "dtype": "bfloat16"}, ""),
    ],
)
def test_cards_that_are_too_old_are_refused_with_what_they_can_do(monkeypatch, capability, changes, mend):
    """Before anything is loaded: the path is nowhere, and nobody looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    cuda, asked = torch.device("cuda", 1), settings("/nowhere", **changes)
    if mend:
        with pytest.raises(PolicyError) as error:
            load_policy(asked, cuda)
        assert mend in str(error.value)
        assert f"Old Card has compute capability {capability[0]}.{capability[1]}" in str(error.value)
    else:
        check_device(asked, cuda)
