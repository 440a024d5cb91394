"""How far a policy has moved from its base on given text, row by row.

With base p and policy q over the next token, KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats. It is measured on
text that neither wrote, token by token with the text's own past (teacher forcing), and in full over the vocabulary: no
sampling, so two measurements of the same weights agree. Torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nspo_lightning import ranks
from nspo_lightning.nullspace.domains import START_TOKENS

Head = Callable[[Tensor], Tensor]
_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk: 64 MiB in float32, and there are two of them."""


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """Sums over the scored tokens of one row of text.

    Attributes:
        skill: The skill that the row belongs to, for results by skill.
        tokens: Number of scored tokens.
        nll: Sum of -log q(token), nats.
        base_nll: Sum of -log p(token), nats; NaN where there is no base to compare with.
        kl: Sum of KL(p || q), nats; NaN where there is no base to compare with.
        first_tokens: Scored tokens at the start of an answer: at most `START_TOKENS`, 0 in text without a prompt.
        first_kl: Sum of KL(p || q) over those, nats.
    """

    skill: str = "general"
    tokens: int
    nll: float
    base_nll: float
    kl: float
    first_tokens: int = 0
    first_kl: float = 0.0


@dataclass(frozen=True)
class TextScores:
    """What was found of rows of text. Sums do not depend on the order of the rows, so not on the number of ranks."""

    rows: tuple[RowScore, ...] = ()

    def __add__(self, other: TextScores) -> TextScores:
        """Return the scores of both texts."""
        return TextScores(self.rows + other.rows)

    def over_ranks(self) -> TextScores:
        """Return the rows of all ranks, which must ask together."""
        return TextScores(tuple(row for scores in ranks.gather_objects(self.rows) for row in scores))

    @property
    def tokens(self) -> int:
        """How many were scored."""
        return sum(row.tokens for row in self.rows)

    @property
    def nll(self) -> float:
        """Sum of -log q(token), nats."""
        return math.fsum(row.nll for row in self.rows)

    @property
    def base_nll(self) -> float:
        """Sum of -log p(token), nats; NaN without a base."""
        return math.fsum(row.base_nll for row in self.rows)

    @property
    def kl(self) -> float:
        """Sum of KL(p || q), nats; NaN without a base."""
        return math.fsum(row.kl for row in self.rows)

    @property
    def mean_nll(self) -> float:
        """Nats a token; NaN without tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def mean_kl(self) -> float:
        """Nats a token; NaN without tokens or a base."""
        return self.kl / self.tokens if self.tokens else math.nan

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


@dataclass(frozen=True, kw_only=True)
class TokenDivergence:
    """How far policy q and base p are apart at each scored token; all of shape (N,), in nats, float64, on the CPU.

    Attributes:
        nll: -log q(token).
        base_nll: -log p(token); NaN without a base.
        kl: KL(p || q) over the vocabulary; NaN without a base.
    """

    nll: Tensor
    base_nll: Tensor
    kl: Tensor

    def as_row(self) -> RowScore:
        """Return all tokens as one row, none of which begins an answer."""
        nll, base_nll, kl = (float(values.sum()) for values in (self.nll, self.base_nll, self.kl))
        return RowScore(tokens=len(self.nll), nll=nll, base_nll=base_nll, kl=kl)


@torch.no_grad()
def token_scores(
    policy_states: Tensor,
    targets: Tensor,
    policy_head: Head,
    base_states: Tensor | None = None,
    base_head: Head | None = None,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> TokenDivergence:
    """Score positions, whose logits exist for one chunk of positions at a time.

    Args:
        policy_states: Shape (N, H), what `policy_head` turns into logits; logits themselves, with the identity.
        targets: Shape (N,), the token that each position predicts.
        policy_head: Maps (n, H) to logits (n, V).
        base_states: Likewise of the base; None = no KL.
        base_head: Of the base; default `policy_head`.
        vocab_size: V, for the chunk's size.
        chunk_tokens: Positions in a chunk; None = as many as 64 MiB of float32 hold.

    Returns:
        The scores of each position.

    Raises:
        ValueError: If `chunk_tokens` is below 1.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> same = token_scores(logits, torch.tensor([0, 0]), lambda x: x, logits, vocab_size=2)
        >>> same.kl.tolist(), [round(value, 4) for value in same.nll.tolist()]
        ([0.0, 0.0], [0.6931, 0.1269])
        >>> uniform = torch.zeros(1, 2)
        >>> moved = token_scores(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), lambda x: x, uniform, vocab_size=2)
        >>> round(float(moved.kl), 4)  # -log 2 - mean(log softmax(0, 1))
        0.1201
    """
    chunk = max(16, _CHUNK_ELEMENTS // max(vocab_size, 1)) if chunk_tokens is None else chunk_tokens
    if chunk < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}.")
    found = torch.full((3, len(targets)), math.nan, dtype=torch.float64)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        log_q = policy_head(policy_states[part]).float().log_softmax(-1)
        found[0, part] = -log_q.gather(-1, targets[part, None])[:, 0].cpu().double()
        if base_states is not None:
            log_p = (base_head or policy_head)(base_states[part]).float().log_softmax(-1)
            found[1, part] = -log_p.gather(-1, targets[part, None])[:, 0].cpu().double()
            found[2, part] = divergence(log_p, log_q).cpu().double()
    return TokenDivergence(nll=found[0], base_nll=found[1], kl=found[2])


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension; differentiable in both.

    A token that p gives no probability adds nothing, whatever q says of it: not 0 * inf.
    """
    log_ratio = log_p.sub(log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * log_ratio).sum(-1)


TextLoss = Literal["kl", "nll", "drawn"]


def token_loss(
    kind: TextLoss,
    policy_states: Tensor,
    targets: Tensor,
    policy_head: Head,
    base_states: Tensor | None = None,
    base_head: Head | None = None,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the sum over positions that `token_scores` measures, with a gradient, in float32.

    Logits exist for one chunk of positions at a time here too: the backward pass computes them again.

    Args:
        kind: ``kl``: of KL(p || q), nats; ``nll`` and ``drawn``: of -log q(token).
        policy_states: See `token_scores`, as for the rest.
        targets: See there.
        policy_head: See there.
        base_states: See there; needed for ``kl``.
        base_head: See there.
        vocab_size: See there.
        chunk_tokens: See there.

    Returns:
        A scalar.
    """

    def of(states: Tensor, tokens: Tensor, reference: Tensor | None) -> Tensor:
        log_q = policy_head(states).float().log_softmax(-1)
        if reference is None:
            return -log_q.gather(-1, tokens[:, None]).sum()
        with torch.no_grad():
            log_p = (base_head or policy_head)(reference).float().log_softmax(-1)
        return divergence(log_p, log_q).sum()

    chunk = max(16, _CHUNK_ELEMENTS // max(vocab_size, 1)) if chunk_tokens is None else chunk_tokens
    total = policy_states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        reference = base_states[part] if kind == "kl" and base_states is not None else None
        total = total + checkpoint(
            of, policy_states[part], targets[part], reference, use_reentrant=False, preserve_rng_state=False
        )
    return total


@torch.no_grad()
def drawn_tokens(states: Tensor, head: Head, generator: torch.Generator, *, vocab_size: int) -> Tensor:
    """Draw a token at each position from what a policy says there; see `token_scores`.

    Returns:
        Shape (N,).

    Raises:
        ValueError: If what it says is not finite.
    """
    chunk = max(16, _CHUNK_ELEMENTS // max(vocab_size, 1))
    drawn = [states.new_zeros(0, dtype=torch.long)]
    for part in torch.split(states, chunk):
        probabilities = head(part).float().softmax(-1)
        if not bool(probabilities.isfinite().all()):
            raise ValueError(
                "The policy's logits on general text are not finite, so no token can be drawn from them. A 16-bit "
                "`policy.dtype` may overflow: try `bfloat16` or `float32`; or the model's weights are damaged."
            )
        if len(part):
            drawn.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
    return torch.cat(drawn)


def predicted_positions(attention_mask: Tensor, labels_mask: Tensor | None = None) -> Tensor:
    """Return the positions whose next token is scored: shape (B, T - 1), bool, true at t if token t + 1 is scored.

    Args:
        attention_mask: Shape (B, T), true = real token.
        labels_mask: Shape (B, T), true = score this token; None = every real token but the first.
    """
    real = attention_mask.bool()
    wanted = real if labels_mask is None else labels_mask.bool() & real
    return wanted[:, 1:] & real[:, :-1]


def first_positions(scored: Tensor, attention_mask: Tensor, labels_mask: Tensor | None) -> Tensor:
    """Return which scored positions predict the first `START_TOKENS` tokens of an answer: shape (B, T - 1), bool.

    Only rows with a real token before the first labelled one have a prompt, and so an answer that begins.

    Args:
        scored: Shape (B, T - 1), what `predicted_positions` says.
        attention_mask: Shape (B, T), true = real token.
        labels_mask: Shape (B, T), true = score this token; None = there is no prompt.
    """
    if labels_mask is None:
        return torch.zeros_like(scored)
    real, labels = attention_mask.bool(), labels_mask.bool()
    begin = real.int().argmax(1, keepdim=True)
    has_prompt = ~labels.gather(1, begin)
    return scored & has_prompt & (scored.cumsum(1) <= START_TOKENS)
