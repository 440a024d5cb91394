"""A merged model, loaded from its folder, gives the logits of base and adapter, also where weights are shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_policies import move_adapter_, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPT2Config

from nspo_lightning.export import merge
from nspo_lightning.export.trained import ExportSource, LowRank
from nspo_lightning.export.write import export_merged
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tied(tokenizer, tmp_path_factory):
    """A random Llama whose head is its embedding."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    return save_llama(tmp_path_factory.mktemp("tied"), tokenizer, **sizes, tie_word_embeddings=True)


def trained(settings: PolicySettings, std: float = 0.2) -> Any:
    """A policy whose B is not zero, as after training."""
    torch.manual_seed(4)
    policy: Any = load_policy(settings, CPU).eval()
    move_adapter_(policy, std)
    return policy


def source(settings: PolicySettings, policy: Any, base: str | None = None) -> ExportSource:
    return ExportSource(
        checkpoint=Path("last.ckpt"),
        config={},
        settings=settings,
        weights={f"policy.{name}": p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad},
        updates=1,
        state={"policy": base or policy_fingerprint(policy)},
        projection=None,
        summary={},
        basis=None,
        basis_path=None,
    )


def settings_of(path: Path, *targets: str, **options: Any) -> PolicySettings:
    lora = LoraSettings(r=4, alpha=8, target_modules=list(targets))
    return PolicySettings(path=str(path), quantization="none", dtype="float32", lora=lora, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(5, 45).view(2, 20)).logits
    return found.float()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def tied_others(tokenizer, tmp_path_factory):
    """Random models of other kinds whose heads are their embeddings: transposed weights, and a vision tower beside."""
    words = len(tokenizer)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text: dict[str, Any] = {
        **ids,
        "vocab_size": words + 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.15,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    special = {"image_token_index": words, "boi_token_index": words + 1, "eoi_token_index": words + 2}
    configs: dict[str, Any] = {
        "gpt2": GPT2Config(
            **ids, vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.15
        ),
        "gemma3": Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special),
    }
    folder = tmp_path_factory.mktemp("others")
    for name, config in configs.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2", ("lm_head", "c_attn", "c_proj")), ("gemma3", ("lm_head", "q_proj"))]
)
def test_shared_heads_of_other_models_are_merged_apart_too(tied_others, tmp_path, name, targets):
    settings = settings_of(tied_others / name, *targets)
    policy = trained(settings)
    wanted, base = logits(policy), logits(AutoModelForCausalLM.from_pretrained(tied_others / name))
    export_merged(source(settings, policy), tmp_path / "out", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert distance(base, wanted) > 0.1
    assert distance(logits(merged), wanted) < 1e-5


@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj", "down_proj"), ("q_proj",)])
def test_a_trained_head_is_merged_apart_from_the_embedding_that_it_was(tied, tmp_path, targets):
    settings = settings_of(tied, *targets)
    policy = trained(settings)
    wanted, base = logits(policy), logits(AutoModelForCausalLM.from_pretrained(tied))
    said = "\n".join(export_merged(source(settings, policy), tmp_path / "out", "float32"))
    assert distance(base, wanted) > 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert distance(logits(merged), wanted) < 1e-5
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert shared == ("lm_head" not in targets)
    assert ("a weight of its own" in said) == ("lm_head" in targets)


def test_an_earlier_adapter_of_a_shared_head_is_merged_as_it_answered(tied, tmp_path):
    settings = settings_of(tied, "lm_head", "q_proj")
    policy = trained(settings)
    wanted = logits(policy)
    policy.save_pretrained(tmp_path / "adapter")
    again = settings_of(tied, "q_proj", adapter=str(tmp_path / "adapter"), merge_adapter=True)
    goes_on = load_policy(again, CPU)
    assert distance(logits(goes_on), wanted) < 1e-5  # the new adapter's B is zero
    goes_on = trained(again)
    export_merged(source(again, goes_on), tmp_path / "out", "float32")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(goes_on)) < 1e-5


def test_an_earlier_adapter_with_a_whole_head_is_merged_as_it_answered(tied, tmp_path):
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    policy: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), config)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    wanted = logits(policy)
    policy.save_pretrained(tmp_path / "adapter")
    again = settings_of(tied, "q_proj", adapter=str(tmp_path / "adapter"), merge_adapter=True)
    goes_on = load_policy(again, CPU)
    assert distance(logits(goes_on), wanted) < 1e-5
    goes_on = trained(again)
    export_merged(source(again, goes_on), tmp_path / "out", "float32")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(goes_on)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_card_says_how_far_the_loaded_folder_is_from_base_and_adapter(tied, tmp_path, dtype):
    settings = settings_of(tied, "lm_head", "q_proj")
    policy = trained(settings)
    said = "\n".join(export_merged(source(settings, policy), tmp_path / "out", dtype))
    card = (tmp_path / "out" / "README.md").read_text()
    line = next(line for line in said.splitlines() if "loaded from the folder" in line)
    assert line in card
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    far = distance(logits(merged), logits(policy))
    assert (far < 1e-5) == (dtype == "float32")
    said_far = float(line.split(" by ")[1].split()[0])
    # Measured on another text, so only the size is the same; float32 differs by rounding alone.
    assert far / 4 <= said_far <= 4 * far if dtype == "bfloat16" else said_far < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fault", ["the head stays tied", "the update has the wrong sign", "the update is lost", "half of it is lost"]
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("std", [0.2, 0.02], ids=["large", "small"])
def test_a_merge_that_does_not_answer_as_the_adapter_is_refused_and_leaves_nothing(
    tied, tmp_path, monkeypatch, fault, stored, std, dtype
):
    AutoModelForCausalLM.from_pretrained(tied, dtype=stored).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "base")
    settings = settings_of(tmp_path / "base", "lm_head", "q_proj")
    policy = trained(settings, std)
    export_merged(source(settings, policy), tmp_path / "right", dtype)
    if fault == "the head stays tied":
        monkeypatch.setattr(merge, "untie_", lambda *_: [])
    else:
        kept = {"the update has the wrong sign": -1.0, "the update is lost": 0.0, "half of it is lost": 0.4}[fault]
        monkeypatch.setattr(LowRank, "dense", lambda self: kept * self.scale * (self.up @ self.down))
    with pytest.raises(PolicyError, match="does not answer as base and adapter"):
        export_merged(source(settings, policy), tmp_path / "out", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "right"]


def test_all_weights_of_a_model_with_a_shared_head_are_written_as_trained(tied, tmp_path):
    settings = replace(settings_of(tied), lora=None)
    policy: Any = load_policy(settings, CPU).eval()
    before = policy_fingerprint(policy)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    wanted = logits(policy)
    export_merged(source(settings, policy, before), tmp_path / "out", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert distance(logits(merged), wanted) < 1e-6
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
