"""Log-probabilities of chosen tokens without ever holding all logits.

With N positions and a vocabulary of V, logits, their softmax and its gradient are N x V each: for V = 150,000 far more
than the rest of the network. Here they exist for a chunk of positions at a time.

If the head is frozen (it is under LoRA, unless adapted on purpose), the gradient with respect to the hidden state h_n
is the upstream scalar g_n times the vector J_n = d log p(y_n | h_n) / d h_n, which does not depend on g. So J (N x H)
is computed in the forward pass while the chunk's logits exist, and the backward pass costs N x H multiplications: no
second pass over the vocabulary, exactly the same gradient. A trainable head is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

# Elements of one chunk of logits: 128 MiB in float32, a few hundred rows of the largest vocabularies.
_CHUNK_ELEMENTS = 2**25
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What the policy thinks of the sampled tokens.

    Attributes:
        log_probs: Shape (R, C), float32, zero where the completion mask is False.
        entropy: Shape (R, C), float32, without gradient, of the whole next-token distribution; None if not asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None = None


def chosen_log_probs(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    vocab_size: int,
    head_is_frozen: bool,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> TokenScores:
    """Return scores, shape (N,), of one target token at each position: log softmax(head(h) / temperature)[target].

    Args:
        hidden: Shape (N, H), last hidden states of the positions that predict the targets.
        targets: Shape (N,), token ids.
        head: Maps (n, H) to logits (n, V), position by position.
        vocab_size: V, for the chunk size.
        head_is_frozen: True = nothing in `head` needs a gradient.
        temperature: Divides the logits, as in sampling.
        with_entropy: Also compute the entropy.
        chunk_tokens: Positions whose logits may exist at once; None = as many as 128 MiB of float32 hold.

    Raises:
        ValueError: If `temperature` or `chunk_tokens` is not positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"`temperature` must be positive to score tokens, got {temperature}. Greedy samples (temperature 0) have "
            "no log-probability other than 0; score them with the temperature that you train at."
        )
    chunk = max(64, _CHUNK_ELEMENTS // vocab_size) if chunk_tokens is None else chunk_tokens
    if chunk < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}.")
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or not head_is_frozen)
    if needs_gradient and head_is_frozen:
        log_probs, entropy = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head, temperature, with_entropy, chunk
        )
        return TokenScores(log_probs=log_probs, entropy=entropy if with_entropy else None)
    parts: list[tuple[Tensor, Tensor]] = []
    for h, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        if needs_gradient:
            parts.append(checkpoint(_score_chunk, h, y, head, temperature, with_entropy, use_reentrant=False))
        else:
            parts.append(_score_chunk(h, y, head, temperature, with_entropy))
    return TokenScores(
        log_probs=torch.cat([part[0] for part in parts]),
        entropy=torch.cat([part[1] for part in parts]) if with_entropy else None,
    )


def _score_chunk(
    hidden: Tensor, targets: Tensor, head: Head, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    # Returns log-probabilities (n,) and entropies: (n,), or empty unless asked for.
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    log_normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normaliser
    with torch.no_grad():
        entropy = log_probs.new_empty(0)
        if with_entropy:
            entropy = _entropy(logits.clamp(min=_LOWEST), log_normaliser, (logits - log_normaliser[:, None]).exp_())
    return log_probs, entropy


def _entropy(logits: Tensor, log_normaliser: Tensor, probabilities: Tensor) -> Tensor:
    # H = log Z - E[logit]. A logit of -inf has probability zero: it is given as the lowest number, or 0 * inf were NaN.
    entropy: Tensor = log_normaliser - torch.linalg.vecdot(probabilities, logits)
    return entropy


class _FrozenHead(torch.autograd.Function):
    """Chunked scoring that keeps one vector a position for the backward pass instead of V probabilities."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float, with_entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies, jacobians = [], [], []
        for h, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                raw = head(leaf)
            logits = raw.detach().float()
            if temperature != 1.0:
                logits = logits / temperature
            log_normaliser = logits.logsumexp(-1)
            log_probs.append(logits.gather(-1, y[:, None]).squeeze(-1) - log_normaliser)
            # d log p[y] / d logits = onehot(y) - p, and one product with the head gives J for the whole chunk: each
            # score depends on its own hidden state alone.
            gradient = (logits - log_normaliser[:, None]).exp_()
            if with_entropy:  # in place where the logits are not the head's own
                shared = logits.data_ptr() == raw.data_ptr()
                logits = logits.clamp(min=_LOWEST) if shared else logits.clamp_(min=_LOWEST)
            entropies.append(_entropy(logits, log_normaliser, gradient) if with_entropy else logits.new_empty(0))
            gradient.neg_()[torch.arange(len(y), device=y.device), y] += 1
            gradient = (gradient if temperature == 1.0 else gradient / temperature).to(raw.dtype)
            jacobians.append(torch.autograd.grad(raw, leaf, gradient)[0])
        ctx.save_for_backward(torch.cat(jacobians))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return (upstream[0][:, None] * jacobian).to(jacobian.dtype), None, None, None, None, None
