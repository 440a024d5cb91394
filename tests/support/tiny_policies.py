"""Tiny random policies of many architectures, with a LoRA adapter that is not zero."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOW = 5  # shorter than the prompts of the tests

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
    "mistral-window": lambda: transformers.MistralConfig(**COMMON, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON, **SPECIAL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    ),
    # A head that scales its logits, a mixture of experts, and a model that can't share prompts.
    "cohere": lambda: transformers.CohereConfig(**COMMON, **SPECIAL),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=2),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}
SHARING = [name for name in CONFIGS if name != "falcon"]


def small_llama(tokenizer, **sizes):
    """Return a random Llama of width 64; `sizes` are settings of its configuration that differ."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": 0.15,  # at the default, logits of a random model hardly differ and nothing can be learnt
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | sizes))


def save_llama(folder, tokenizer, **sizes):
    """Write a `small_llama` with its tokenizer."""
    small_llama(tokenizer, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_base(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far from uniform next-token distributions
                parameter.mul_(3)
    return model.requires_grad_(False)


def with_adapter(base, **kwargs):
    torch.manual_seed(1)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", **kwargs))
    move_adapter_(policy, 0.05)
    return policy


def move_adapter_(policy, std):
    """Give B values, as after training: while it is zero, the adapter does nothing."""
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def tiny_policy(name="llama", **kwargs):
    return with_adapter(tiny_base(name), **kwargs)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of token ids without padding, in eval mode, which the model is left in."""
    found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def largest_change(after: torch.Tensor, before: torch.Tensor) -> float:
    """Return the largest difference of an entry, relative to the largest entry."""
    return float((after - before).abs().max() / before.abs().max())


def ragged_prompts():
    """Three prompts of lengths 4, 7 and 6, left-padded: shape (3, 7)."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :3] = False
    mask[2, :1] = False
    return ids.masked_fill(~mask, 0), mask
