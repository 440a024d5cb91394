"""The chat template: one for everything, held by the tokenizer and saved with it, the run's variables set in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspo_lightning.policy.settings import PolicyError, PolicySettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that every rendering sets itself."""


def read_chat_template(setting: str) -> str:
    """Return the chat template that a setting gives: itself, or the content of the file whose path it is.

    Raises:
        PolicyError: If it is neither.
    """
    path = os.path.expanduser(setting)
    if os.path.isfile(path):  # unlike pathlib's, it takes a template of any length as no file
        return Path(path).read_text(encoding="utf-8")
    if "{" not in setting:
        raise PolicyError(
            f"`policy.chat_template` is neither a Jinja template nor a file that is there: {setting[:300]!r}. "
            "Give the template's text or the path of a .jinja file."
        )
    return setting


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name what a tokenizer's template says, wherever it was given, with its variables: 16 hex digits."""
    text = json.dumps(tokenizer.chat_template, sort_keys=True)  # some tokenizers have several, by name
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_chat_template(settings: PolicySettings, template: str | None) -> PolicySettings:
    """Return the settings with a datamodule's template, if it has one; PolicyError if theirs is another."""
    if template is None:
        return settings
    if settings.chat_template is None:
        return replace(settings, chat_template=template)
    if read_chat_template(settings.chat_template) != read_chat_template(template):
        raise PolicyError(
            "`policy.chat_template` and `data.chat_template` are two names of one setting, and two templates were "
            "given. Leave `data.chat_template` out."
        )
    return settings


def set_chat_template_(tokenizer: PreTrainedTokenizerBase, settings: PolicySettings) -> None:
    """Give a tokenizer the template and the variables that the settings name, whoever renders with it.

    Raises:
        PolicyError: If there is no template, or it does not know a variable.
    """
    if settings.chat_template is not None:
        tokenizer.chat_template = read_chat_template(settings.chat_template)
    if not tokenizer.chat_template:
        raise PolicyError(
            f"The tokenizer of '{settings.tokenizer or settings.model_path}' has no chat template, so prompts can't "
            "be rendered. Give one as `policy.chat_template` (a Jinja template, or a file that holds one)."
        )
    variables = settings.chat_template_kwargs
    if not variables:
        return
    found: str | dict[str, str] = tokenizer.chat_template  # some tokenizers have several, by name
    _check_known(variables, " ".join(found.values()) if isinstance(found, dict) else found, tokenizer)
    named = {name: _with_variables(text, variables) for name, text in found.items()} if isinstance(found, dict) else {}
    tokenizer.chat_template = named or _with_variables(str(found), variables)


def _with_variables(template: str, variables: Mapping[str, Any]) -> str:
    # Jinja reads Python's literals. The line break behind a block is not printed (`trim_blocks`).
    default = "{{% if {0} is not defined %}}{{% set {0} = {1!r} %}}{{% endif %}}"
    return "".join(default.format(*pair) for pair in variables.items()) + "\n" + template


def _check_known(variables: Mapping[str, Any], template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    taken = {*_GIVEN, *tokenizer.special_tokens_map}
    for name in variables:
        if not name.isidentifier() or name in taken:
            raise PolicyError(
                f"`policy.chat_template_kwargs` has '{name}', which is no variable that can be set: it must be a "
                f"name, and none of {', '.join(sorted(taken))}, which every rendering sets itself."
            )
        if not re.search(rf"\b{name}\b", template):
            raise PolicyError(
                f"`policy.chat_template_kwargs` sets '{name}', which the chat template never reads, so it would change "
                "nothing. Mend the name (Qwen3's is `enable_thinking`), or leave it out."
            )
