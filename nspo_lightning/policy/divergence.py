"""How far a policy has moved from its base on given text: sums that add up over chunks, batches and ranks.

With base p and policy q over the next token, KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats. It is measured on
text that neither wrote, token by token with the text's own past (teacher forcing), and in full over the vocabulary: no
sampling, so two measurements of the same weights agree. Torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nspo_lightning import ranks

Head = Callable[[Tensor], Tensor]
_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk: 64 MiB in float32, and there are two of them."""


@dataclass(frozen=True, kw_only=True)
class TextSums:
    """Sums over the scored tokens of some text.

    Attributes:
        nll: Of -log q(token), nats.
        kl: Of KL(p || q), nats; NaN where there is no base to compare with.
        base_nll: Of -log p(token), nats; NaN likewise.
        tokens: How many.
    """

    nll: float = 0.0
    kl: float = 0.0
    base_nll: float = 0.0
    tokens: int = 0

    def __add__(self, other: TextSums) -> TextSums:
        """Return the sums over both texts."""
        return TextSums(
            nll=self.nll + other.nll,
            kl=self.kl + other.kl,
            base_nll=self.base_nll + other.base_nll,
            tokens=self.tokens + other.tokens,
        )

    @property
    def mean_nll(self) -> float:
        """Nats a token; NaN without tokens."""
        return self.nll / self.tokens if self.tokens else float("nan")

    @property
    def mean_kl(self) -> float:
        """Nats a token; NaN without tokens."""
        return self.kl / self.tokens if self.tokens else float("nan")

    @property
    def perplexity(self) -> float:
        """Return exp(mean NLL); infinite where that overflows."""
        return float(torch.tensor(self.mean_nll, dtype=torch.float64).exp())

    def as_dict(self) -> dict[str, Any]:
        """Return what a result file holds; empty without tokens."""
        if not self.tokens:
            return {}
        return {
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "nll_nats": self.mean_nll,
            "base_nll_nats": None if math.isnan(self.base_nll) else self.base_nll / self.tokens,
            "kl_to_base_nats": None if math.isnan(self.kl) else self.mean_kl,
        }

    def over_ranks(self, device: torch.device) -> TextSums:
        """Return the sums over all ranks, which must ask together and exchange tensors on this device."""
        if ranks.world_size() == 1:
            return self
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.tensor([self.nll, self.kl, self.base_nll, float(self.tokens)], device=device, dtype=dtype)
        nll, kl, base_nll, tokens = ranks.all_reduce_sum(sums).tolist()
        return TextSums(nll=nll, kl=kl, base_nll=base_nll, tokens=round(tokens))


@torch.no_grad()
def text_sums(
    policy_states: Tensor,
    targets: Tensor,
    policy_head: Head,
    base_states: Tensor | None = None,
    base_head: Head | None = None,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> TextSums:
    """Sum NLL and KL over positions, whose logits exist for one chunk of positions at a time.

    Args:
        policy_states: Shape (N, H), what `policy_head` turns into logits; logits themselves, with the identity.
        targets: Shape (N,), the token that each position predicts.
        policy_head: Maps (n, H) to logits (n, V).
        base_states: Likewise of the base; None = no KL.
        base_head: Of the base; default `policy_head`.
        vocab_size: V, for the chunk's size.
        chunk_tokens: Positions in a chunk; None = as many as 64 MiB of float32 hold.

    Returns:
        The sums; `kl` and `base_nll` are NaN without a base.

    Raises:
        ValueError: If `chunk_tokens` is below 1.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> same = text_sums(logits, torch.tensor([0, 0]), lambda x: x, logits, vocab_size=2)
        >>> round(same.kl, 6), round(same.mean_nll, 4), same.tokens
        (0.0, 0.41, 2)
        >>> uniform = torch.zeros(1, 2)
        >>> moved = text_sums(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), lambda x: x, uniform, vocab_size=2)
        >>> round(moved.kl, 4)  # -log 2 - mean(log softmax(0, 1))
        0.1201
    """
    chunk = max(16, _CHUNK_ELEMENTS // max(vocab_size, 1)) if chunk_tokens is None else chunk_tokens
    if chunk < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}.")
    nll = kl = base_nll = 0.0
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        log_q = policy_head(policy_states[part]).float().log_softmax(-1)
        nll -= float(log_q.gather(-1, targets[part, None]).double().sum())
        if base_states is not None:
            log_p = (base_head or policy_head)(base_states[part]).float().log_softmax(-1)
            base_nll -= float(log_p.gather(-1, targets[part, None]).double().sum())
            # A token that the base gives no probability adds nothing, whatever the policy says of it: not 0 * inf.
            log_ratio = log_p.sub(log_q).masked_fill_(log_p.isneginf(), 0.0)
            kl += float(log_p.exp_().mul_(log_ratio).sum(-1).double().sum())
    if base_states is None:
        kl = base_nll = float("nan")
    return TextSums(nll=nll, kl=kl, base_nll=base_nll, tokens=len(targets))


def predicted_positions(attention_mask: Tensor, labels_mask: Tensor | None = None) -> Tensor:
    """Return the positions whose next token is scored: shape (B, T - 1), bool, true at t if token t + 1 is scored.

    Args:
        attention_mask: Shape (B, T), true = real token.
        labels_mask: Shape (B, T), true = score this token; None = every real token but the first.
    """
    real = attention_mask.bool()
    wanted = real if labels_mask is None else labels_mask.bool() & real
    return wanted[:, 1:] & real[:, :-1]


def by_domain(batch: Mapping[str, Any], domains: Sequence[str]) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Yield a batch of text once for each of some domains, and once under None for all others.

    Only the rows of that domain are scored in it. All rows stay, and with several ranks domains without a row too, so
    that sharded models are called equally often on all of them.

    Args:
        batch: Of rows whose domains are `domain`, if it has that; see `score_text`.
        domains: What is scored apart.
    """
    names, mask = batch.get("domain"), batch.get("labels_mask", batch["attention_mask"]) if domains else None
    if names is None or mask is None:
        yield None, batch
        return
    for domain in (None, *domains):
        rows = [name == domain if domain is not None else name not in domains for name in names]
        if any(rows) or ranks.world_size() > 1:
            yield domain, {**batch, "labels_mask": mask * torch.tensor(rows, device=mask.device)[:, None]}
