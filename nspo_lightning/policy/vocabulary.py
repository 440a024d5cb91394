"""Whether the policy's embedding has a row for every token that its tokenizer gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from nspo_lightning.policy.parts import causal_model
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.terminal import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens that a policy's embedding has rows for.

    Attributes:
        rows: Tokens from this number on have none.
        beyond: Those that the tokenizer knows nevertheless, by number.
        owner: The model, for messages.
        cure: How to give them rows.
    """

    rows: int
    beyond: dict[int, str]
    owner: str
    cure: str

    def check(self, texts: Iterable[Sequence[int]]) -> None:
        """Refuse texts, as token ids on the CPU, that hold such a token.

        Raises:
            PolicyError: Naming it.
        """
        if not self.beyond:
            return
        for ids in texts:
            if ids and (index := max(ids)) >= self.rows:
                raise PolicyError(
                    f"A text holds the token {self.beyond.get(index, '?')!r} ({index}), and the embedding of "
                    f"'{self.owner}' has {self.rows} rows. Take it out of the data. {self.cure}"
                )


def check_vocabulary(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings) -> Vocabulary:
    """Refuse a tokenizer whose tokens the policy's embedding has no rows for.

    Special tokens that neither text nor template needs may lack one (a picture's place, in models of text alone): texts
    with one are refused where they become ids. An embedding with more rows than there are tokens is normal.

    Returns:
        What refuses them.

    Raises:
        PolicyError: Naming the tokens that need a row.
    """
    embedding = causal_model(policy).get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    template, added = str(tokenizer.chat_template), tokenizer.added_tokens_decoder
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    missing = {
        index: token
        for index, token in sorted(beyond.items())
        if index in used or token in template or index not in added or not added[index].special
    }
    where = settings.tokenizer or settings.model_path
    tokens = max(beyond, default=rows - 1) + 1
    cure = (
        "If it is another model's, give the policy's own (`policy.tokenizer`). If tokens were added to it, resize the "
        f"model once (`model.resize_token_embeddings({tokens})`), save it with the tokenizer, and give that "
        "folder as `policy.path`."
    )
    if missing:
        shown = ", ".join(f"{token!r} ({index})" for index, token in list(missing.items())[:5])
        raise PolicyError(
            f"The tokenizer of '{where}' has {len(tokenizer)} tokens, and the embedding of '{settings.path}' has "
            f"{rows} rows: {counted(len(missing), 'token has', 'tokens have')} none: "
            f"{shown}{', ...' if len(missing) > 5 else ''}. {cure}"
        )
    return Vocabulary(rows=rows, beyond=beyond, owner=settings.path, cure=cure)
