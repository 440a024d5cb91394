"""Attention in which a group of completions shares the keys and values of one prompt.

The policy sees one flat list of tokens: all prompts, then all completions, no padding (shape (1, T) to the model, so
that embeddings, norms, projections and adapters need not know). Only attention must know who may look at whom:

- a prompt token attends to its prompt, causally;
- a completion token attends to all of its prompt, and causally to its own completion.

Sizes: P prompts, R completions, H query heads on K key-value heads (each serves n = H / K), head size d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nspo_lightning.policy.ragged import Ragged


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return attention of grouped heads, shape (B, T, H, d), without copying keys and values for each query head.

    The n query heads of one key-value head are laid behind each other as n * T queries.

    Args:
        query: Shape (B, T, H, d).
        key: Shape (B, S, K, d).
        value: Shape (B, S, K, d).
        bias: Shape (B or 1, T, S), 0 where a query may look and -inf where not; None = causal, for T = S.
        scale: Factor on the scores; None = 1 / sqrt(d).
        softcap: Scores are capped by softcap * tanh(scores / softcap).
        dropout: Probability of dropping an attention weight.
    """
    batch, length, heads, size = query.shape
    shared = heads // key.shape[2]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if bias is None and softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scale, is_causal=length > 1, enable_gqa=shared > 1
        )
        return out.transpose(1, 2)
    if bias is None:
        bias = causal_bias(torch.ones(1, length, dtype=torch.bool, device=q.device), length, None, q.dtype)
    q = q.reshape(batch, heads // shared, shared * length, size)
    bias = bias[:, None].repeat(1, 1, shared, 1) if shared > 1 else bias[:, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    else:
        scores = torch.matmul(q, k.transpose(2, 3)) * (size**-0.5 if scale is None else scale)
        scores = (scores / softcap).tanh() * softcap + bias
        weights = F.dropout(scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), dropout)
        out = torch.matmul(weights, v)
    return out.reshape(batch, heads, length, -1).transpose(1, 2)


def causal_bias(key_mask: Tensor, queries: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Let each of the last ``queries`` columns look at the real columns up to itself, at most ``window`` of them.

    Args:
        key_mask: Shape (B, S), bool, True = real token; the queries are the last T columns of these.
        queries: T.
        window: Sliding window, counted in tokens with the query's own; None = unlimited.
        dtype: Dtype of the attention scores.

    Returns:
        Shape (B, T, S): 0 = may look, -inf = may not. Every query may look at itself, so that padding stays finite.
    """
    length = key_mask.shape[1]
    column = torch.arange(length, device=key_mask.device)
    distance = column[length - queries :, None] - column[None]
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    allowed = (allowed & key_mask[:, None]) | (distance == 0)
    return torch.zeros(allowed.shape, dtype=dtype, device=key_mask.device).masked_fill_(~allowed, -torch.inf)


class GroupPass:
    """One pass over prompts and their completions, for scoring with gradients or for filling a sampler's memory.

    Args:
        prompt_mask: Shape (P, L), bool, left-padded; or made a `Ragged` already.
        completion_mask: Shape (P * G, C), bool, right-padded, likewise; or None for prompts alone.
        memory: Where to leave each layer's prompt keys and values, each (P, L, K, d), by layer number.
    """

    def __init__(
        self,
        prompt_mask: Tensor | Ragged,
        completion_mask: Tensor | Ragged | None = None,
        memory: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.prompts = prompt_mask if isinstance(prompt_mask, Ragged) else Ragged(prompt_mask)
        self.completions = Ragged(completion_mask) if isinstance(completion_mask, Tensor) else completion_mask
        self.memory = memory
        self._biases: dict[tuple[str, int | None], Tensor | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        """Return the attention within one layer, given by its number, shape (T, H, d).

        `query` has shape (T, H, d), the tokens of all prompts, then of all completions; `key` and `value` (T, K, d).
        `settings` are `window` and what `attend` takes.
        """
        window = settings.pop("window")
        split = self.prompts.size
        q, k, v = (self.prompts.pad(x[:split]) for x in (query, key, value))
        out = self.prompts.pack(attend(q, k, v, bias=self._prompt_bias(window, q.dtype), **settings))
        if self.memory is not None:
            self.memory[layer] = (k, v)
        if self.completions is None:
            return out
        group = self.completions.shape[0] // self.prompts.shape[0]
        q, own_k, own_v = (self.completions.pad(x[split:]) for x in (query, key, value))
        k = torch.cat([k.repeat_interleave(group, 0), own_k], 1)
        v = torch.cat([v.repeat_interleave(group, 0), own_v], 1)
        rest = attend(q, k, v, bias=self._completion_bias(window, q.dtype), **settings)
        return torch.cat([out, self.completions.pack(rest)])

    def _prompt_bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        name = ("prompt", window)
        if name not in self._biases:
            mask = self.prompts.mask
            plain = self.prompts.is_full and (window is None or window >= mask.shape[1])
            self._biases[name] = None if plain else causal_bias(mask, mask.shape[1], window, dtype)
        return self._biases[name]

    def _completion_bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        name = ("completion", window)
        if name not in self._biases and self.completions is not None:
            rows, length = self.completions.shape
            mask = self.prompts.mask
            # Right padding needs no mask: only padding looks at it. Without left padding all rows are alike.
            mask = mask[:1] if self.prompts.is_full else mask.repeat_interleave(rows // len(mask), 0)
            mask = torch.cat([mask, mask.new_ones(len(mask), length)], 1)
            self._biases[name] = causal_bias(mask, length, window, dtype)
        return self._biases[name]
