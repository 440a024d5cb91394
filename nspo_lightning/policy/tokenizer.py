"""The tokenizer with its chat template, and the tokens that end a completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nspo_lightning.policy.chat_template import set_chat_template_
from nspo_lightning.policy.loading import from_pretrained
from nspo_lightning.policy.parts import causal_model, text_setting
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.turns import answer_place, end_of_turn, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer, left-padding, with a pad token and a chat template; PolicyError if it can't be had."""
    from transformers import AutoTokenizer

    path = settings.tokenizer or settings.model_path
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, "tokenizer", settings, path)
    set_chat_template_(tokenizer, settings)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise PolicyError(f"The tokenizer of '{path}' has no EOS token, so no completion could ever end. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a completion, sorted: the generation settings' EOS ids and the tokenizer's."""
    model = causal_model(policy)
    found: set[int] = {int(tokenizer.eos_token_id)}
    for ids in (model.generation_config.eos_token_id, text_setting(model, "eos_token_id")):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return sorted(found)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts behind an answer; None where it puts none."""

    def render(answer: str) -> str:
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False))

    try:
        text, _, end = answer_place(render, "z")
    except (
        Exception
    ):  # Jinja raises its own types, and a template may raise anything; then prompts fail too, and say so
        return None
    ids: list[int] = tokenizer(text[end:], add_special_tokens=False)["input_ids"]
    place = end_of_turn(ids, special_ids(tokenizer))
    return None if place is None else ids[place]
