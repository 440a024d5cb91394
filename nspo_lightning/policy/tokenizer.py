"""The tokenizer with its chat template, and the tokens that end a completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from nspo_lightning.policy.loading import _from_pretrained
from nspo_lightning.policy.settings import PolicyError, PolicySettings


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer, left-padding, with a pad token and a chat template.

    Args:
        settings: What to load.

    Returns:
        The tokenizer.

    Raises:
        PolicyError: If there is none, or it has no chat template and none is given.
    """
    from transformers import AutoTokenizer

    path = settings.tokenizer or settings.model_path
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", settings, path)
    if settings.chat_template is not None:
        file = Path(settings.chat_template)
        is_file = len(settings.chat_template) < 1024 and file.is_file()
        if not is_file and "{" not in settings.chat_template:
            raise PolicyError(
                f"`policy.chat_template` is neither a Jinja template nor a file that is there: "
                f"{settings.chat_template[:80]!r}. Give the template's text or the path of a .jinja file."
            )
        tokenizer.chat_template = file.read_text() if is_file else settings.chat_template
    if not tokenizer.chat_template:
        raise PolicyError(
            f"The tokenizer of '{path}' has no chat template, so prompts can't be rendered. "
            "Give one as `policy.chat_template` (a Jinja template, or a file that holds one)."
        )
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise PolicyError(f"The tokenizer of '{path}' has no EOS token, so no completion could ever end. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def stop_token_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Collect every token that ends a completion: the generation settings' EOS ids and the tokenizer's.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.

    Returns:
        Sorted token ids.
    """
    found: set[int] = {int(tokenizer.eos_token_id)}
    for config in (getattr(policy, "generation_config", None), getattr(policy, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return sorted(found)
