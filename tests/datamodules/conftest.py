"""A byte-level tokenizer with a chat template, made in memory."""

from __future__ import annotations

import pytest
from chat_templates import byte_tokenizer
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    fast = byte_tokenizer(*ROLES)
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    return byte_tokenizer(*ROLES)
