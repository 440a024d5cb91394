"""Tiny random checkpoints in the hub's format, and rows true to the schemas that the datamodules read."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from lightning.pytorch import seed_everything

torch.set_num_threads(1)  # models here are too small for two, and busy machines stall on threads that wait


@pytest.fixture(autouse=True)
def _same_noise():
    seed_everything(0, verbose=False)


@pytest.fixture(scope="session")
def tokenizer():
    from nspo_lightning.toy.train_tokenizer import train_tokenizer
    from nspo_lightning.toy.world import examples

    return train_tokenizer([f"{e.prompt} {e.answer}" for e in examples("benign", "train")[:200]], 320)


@pytest.fixture(scope="session")
def tiny_llama(tokenizer, tmp_path_factory):
    """A random Llama of width 64 in a folder."""
    from tiny_policies import save_llama

    torch.manual_seed(1)
    return save_llama(tmp_path_factory.mktemp("tiny_llama"), tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen2(tokenizer, tmp_path_factory):
    """A random Qwen2 with its own tokenizer class and ChatML template, as on the hub."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("tiny_qwen2")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    qwen.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen2Config(
        vocab_size=len(qwen),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    network = Qwen2ForCausalLM(config)
    network.generation_config.eos_token_id = [qwen.eos_token_id, qwen.pad_token_id]
    network.save_pretrained(folder)
    qwen.save_pretrained(folder)
    return folder
