"""How a policy scores given text, beside its base, which is the same model with the adapter off.

Logits exist for a chunk of positions at a time; between the two passes only hidden states are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.modes import adapters_off, evaluation_mode
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.divergence import (
    RowScore,
    TextLoss,
    TextScores,
    TokenDivergence,
    drawn_tokens,
    first_positions,
    predicted_positions,
    token_loss,
    token_scores,
)
from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.policy.scoring import positions
from nspo_lightning.policy.settings import PolicyError


class BaseStates:
    """The base's hidden states of texts that are scored again and again: computed once, kept on the CPU.

    A text is known by its ids, masks and precision. What does not fit is computed each time.

    Args:
        room: Bytes to keep at most.
    """

    def __init__(self, room: int = 2**28) -> None:
        self._room = room
        self._kept: dict[bytes, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(states.nbytes for states in self._kept.values())

    def get(self, key: bytes) -> Tensor | None:
        """Return the states of a text, on the CPU; None if they are not kept."""
        return self._kept.get(key)

    def put(self, key: bytes, states: Tensor) -> None:
        """Keep the states of a text, if there is room."""
        size = states.numel() * states.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[key] = states.cpu()


@torch.no_grad()
def score_text(policy: nn.Module, batch: Mapping[str, Any], base: BaseStates | None = None) -> TextScores:
    """Score the tokens of a batch of text; there is no KL without an adapter.

    Args:
        policy: A PEFT model, or a plain causal language model; run in eval mode, and left in the mode it was in.
        batch: `input_ids` and `attention_mask` (1 = real token) of shape (B, T), padded on either side; `labels_mask`
            (1 = score this token) of the same shape, or every real token but the first is scored; `domain`, the rows'
            skills.
        base: What is known of the base's states; gets what is not. Of one policy only.

    Returns:
        The scores of the rows that have a scored token, in their order.
    """
    text = _Text(policy, batch)
    with evaluation_mode(policy):
        policy_states = text.states()
        found = token_scores(
            policy_states,
            text.targets,
            text.parts.head,
            text.base_states(base) if has_adapter(policy) else None,
            text.base_head,
            vocab_size=text.parts.vocab_size,
        )
    first = first_positions(text.scored, text.mask, text.labels)
    return TextScores(_by_row(found, text.scored.cpu(), first.cpu(), batch.get("domain")))


def text_loss(
    policy: nn.Module, batch: Mapping[str, Any], kind: TextLoss, base: BaseStates | None = None
) -> tuple[Tensor, int]:
    """Return the sum over the tokens of a batch that `score_text` measures, with a gradient, and how many tokens.

    Args:
        policy: A PEFT model; run without dropout, and left in the mode it was in.
        batch: See `score_text`.
        kind: ``kl``: of KL(base || policy); ``nll``: of -log q(token); ``drawn``: of -log q of a token that is drawn
            from q there, the same one each time for the same text and model.
        base: See `score_text`.

    Raises:
        PolicyError: If a KL is asked for and there is no adapter to switch off.
    """
    if kind == "kl" and not has_adapter(policy):
        raise PolicyError(
            "The KL to the base is to the policy with its adapter off, and there is no adapter (`policy.lora: null`). "
            "Train an adapter, or leave that term out."
        )
    text = _Text(policy, batch)
    with evaluation_mode(policy):
        with torch.no_grad():
            reference = text.base_states(base) if kind == "kl" else None
        states = text.states()
        targets = text.drawn(states.detach()) if kind == "drawn" else text.targets

    def head(hidden: Tensor) -> Tensor:
        with evaluation_mode(policy):  # the backward pass runs it again
            return text.parts.head(hidden)

    size = text.parts.vocab_size
    loss = token_loss(kind, states, targets, head, reference, text.base_head, vocab_size=size)
    return loss, int(text.scored.sum())


class _Text:
    """A batch of text on its way through a policy and its base.

    Attributes:
        mask: Shape (B, T), 1 = real token.
        labels: Shape (B, T), 1 = score this token; None = every real token but the first.
        scored: Shape (B, T - 1), see `predicted_positions`; N of them are true.
        targets: Shape (N,), the tokens there.
        parts: Decoder and head of the policy.
    """

    def __init__(self, policy: nn.Module, batch: Mapping[str, Any]) -> None:
        device = next(policy.parameters()).device
        self.policy, self.parts = policy, policy_parts(policy)
        self.ids, self.mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        labels = batch.get("labels_mask")
        self.labels = None if labels is None else labels.to(device)
        self.scored = predicted_positions(self.mask, self.labels)
        self.targets = self.ids[:, 1:][self.scored]

    def states(self) -> Tensor:
        """Return the hidden states, shape (N, H), of the policy as it is now."""
        places = positions(self.mask.bool())
        hidden, _ = self.parts.decode(self.ids, attention_mask=self.mask, position_ids=places, use_cache=False)
        return hidden[:, :-1][self.scored]

    def base_states(self, base: BaseStates | None) -> Tensor:
        """Return those of the base, which need no second pass where they are known."""
        # Sharded weights are gathered by all ranks together, and what one of them keeps another may have to compute.
        keeps = base if base is not None and not _is_sharded(self.policy) else BaseStates(0)
        key = _text_key(self.ids, self.mask, self.scored)
        if (kept := keeps.get(key)) is not None:
            return kept.to(self.ids.device)
        with adapters_off(self.policy):
            found = self.states()
        keeps.put(key, found)
        return found

    def drawn(self, states: Tensor) -> Tensor:
        """Return a token for each state, drawn from the policy; the text itself is the seed."""
        seed = int.from_bytes(_text_key(self.ids, self.mask, self.scored)[:7], "big")
        generator = torch.Generator(states.device).manual_seed(seed)
        return drawn_tokens(states, self.parts.head, generator, vocab_size=self.parts.vocab_size)

    def base_head(self, hidden: Tensor) -> Tensor:
        """Map the base's hidden states to its logits."""
        if self.parts.head_is_frozen:
            return self.parts.head(hidden)
        # An adapter on the output head is the exception, and must be off as well.
        with evaluation_mode(self.policy), adapters_off(self.policy):
            return self.parts.head(hidden)


def score_texts(policy: nn.Module, batches: Iterable[Mapping[str, Any]]) -> TextScores:
    """Score this rank's share of batches (see `score_text`) and return the rows of all ranks."""
    return sum((score_text(policy, batch) for batch in batches), TextScores()).over_ranks()


def _by_row(
    found: TokenDivergence, scored: Tensor, first: Tensor, skills: Sequence[str] | None
) -> tuple[RowScore, ...]:
    """Sum tokens by row; `scored` says where they are, shape (B, T - 1), and `first` which of them begin an answer."""
    rows, begins = scored.nonzero()[:, 0], first[scored]
    result = []
    for row in range(len(scored)):
        own, own_first = rows == row, (rows == row) & begins
        if not bool(own.any()):
            continue
        result.append(
            RowScore(
                skill="general" if skills is None else skills[row],
                tokens=int(own.sum()),
                nll=float(found.nll[own].sum()),
                base_nll=float(found.base_nll[own].sum()),
                kl=float(found.kl[own].sum()),
                first_tokens=int(own_first.sum()),
                first_kl=float(found.kl[own_first].sum()),
            )
        )
    return tuple(result)


def _is_sharded(policy: nn.Module) -> bool:
    return any(ranks.local_part(parameter) is not parameter for parameter in policy.parameters())


def _text_key(ids: Tensor, mask: Tensor, scored: Tensor) -> bytes:
    """Name a text by its tokens, and by the precision in which they are run."""
    digest = hashlib.blake2b(digest_size=16)
    kind = ids.device.type
    digest.update(str((ids.shape, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))).encode())
    for tensor in (ids, mask.long(), scored):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()
