"""Whether the policy's embedding has a row for every token that its tokenizer gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from nspo_lightning.policy.parts import causal_model
from nspo_lightning.policy.settings import PolicyError, PolicySettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings) -> None:
    """Refuse a tokenizer whose tokens the policy's embedding has no rows for.

    Special tokens that neither text nor template needs may lack one (a picture's place, in models of text alone): then
    each text is looked at before it is embedded. An embedding with more rows than there are tokens is normal.

    Raises:
        PolicyError: Naming such tokens; for those that may lack a row, when a text holds one.
    """
    embedding = causal_model(policy).get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    template, added = str(tokenizer.chat_template), tokenizer.added_tokens_decoder
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    missing = {
        index: token
        for index, token in sorted(beyond.items())
        if index in used or token in template or index not in added or not added[index].special
    }
    where = settings.tokenizer or settings.model_path
    cure = (
        "If it is another model's, give the policy's own (`policy.tokenizer`). If tokens were added to it, resize the "
        f"model once (`model.resize_token_embeddings({max(beyond) + 1})`), save it with the tokenizer, and give that "
        "folder as `policy.path`."
    )
    if missing:
        shown = ", ".join(f"{token!r} ({index})" for index, token in list(missing.items())[:5])
        raise PolicyError(
            f"The tokenizer of '{where}' has {len(tokenizer)} tokens, and the embedding of '{settings.path}' has "
            f"{rows} rows: {len(missing)} tokens have none: {shown}{', ...' if len(missing) > 5 else ''}. {cure}"
        )

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].numel() and int(args[0].max()) >= rows:
            index = int(args[0].max())
            raise PolicyError(
                f"A text holds the token {beyond.get(index, '?')!r} ({index}), and the embedding of '{settings.path}' "
                f"has {rows} rows. Take it out of the data. {cure}"
            )

    embedding.register_forward_pre_hook(look)
