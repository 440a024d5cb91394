"""Keys and values while completions grow: one copy a prompt, or one a row.

`SharedMemory` holds each prompt's keys and values once and a growing buffer for each completion; a decoding step
attends to both parts and joins them in one softmax. `FixedMemory` (fixed_memory.py) does the same in shapes that stay.
`RowMemory` is transformers' own cache with a full row for each completion: for models that can't share, and as the
reference that sharing is tested against. `decode_dynamically` does not know which one it has.

Sizes: P prompts of length L, R rows still running, K key-value heads each serving n query heads, head size d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nspo_lightning.policy.attention import GroupPass
from nspo_lightning.policy.parts import PolicyParts
from nspo_lightning.policy.scoring import positions
from nspo_lightning.policy.sharing import group_attention

_FIRST_CAPACITY = 32  # tokens a row; doubled whenever full


class SharedMemory:
    """Prompts once, completions a row each."""

    def __init__(self, parts: PolicyParts, group_size: int) -> None:
        self._parts = parts
        self._group_size = group_size
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._length: int | Tensor = 0  # of the completions

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run prompts (P, L), left-padded, and return the logits of each row's first token, shape (P * G, V)."""
        group_pass = GroupPass(mask, memory=self._prompts)
        with group_attention(self._parts.model):
            states, _ = self._parts.decode(
                ids[mask][None],
                position_ids=positions(mask)[mask][None],
                use_cache=False,
                group_pass=group_pass,
            )
        lengths = mask.sum(1)
        logits = self._parts.head(states[0, lengths.cumsum(0) - 1])
        self._prompt_mask = mask
        self._prompt_lengths = lengths
        self._owner = torch.arange(len(ids), device=ids.device).repeat_interleave(self._group_size)
        self._plan()
        return logits.repeat_interleave(self._group_size, 0)

    def step(self, token: Tensor) -> Tensor:
        """Append a token to each running row, shape (R,), and return the next token's logits, shape (R, V)."""
        position = self._prompt_lengths[self._owner] + self._length
        self._bias_by_window: dict[int | None, Tensor | None] = {}
        with group_attention(self._parts.model):
            states, _ = self._parts.decode(token[None], position_ids=position[None], use_cache=False, group_pass=self)
        self._length += 1
        return self._parts.head(states[0])

    def keep(self, rows: Tensor) -> None:
        """Keep these of the running rows, shape (R',), and forget prompts that none is left of."""
        for layer, (k, v) in self._own.items():  # one by one, so that no two copies of all layers are held
            self._own[layer] = (k[rows], v[rows])
        prompts, self._owner = torch.unique(self._owner[rows], return_inverse=True)
        if len(prompts) < len(self._prompt_mask):
            for layer, (k, v) in self._prompts.items():
                self._prompts[layer] = (k[prompts], v[prompts])
            self._prompt_mask, self._prompt_lengths = self._prompt_mask[prompts], self._prompt_lengths[prompts]
        self._plan()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        """Attend within one layer: what a group pass does, for one new token a row.

        Args:
            layer: The layer's number.
            query: Shape (R, K * n, d).
            key: Shape (R, K, d).
            value: Shape (R, K, d).
            settings: `window`, `scale` and `softcap`.

        Returns:
            Shape (R, K * n, d).
        """
        rows, kv_heads, size = key.shape
        own_k, own_v = self._remember(layer, key, value)
        prompt_k, prompt_v = self._prompts[layer]
        prompts, length = prompt_k.shape[:2]
        scale = size**-0.5 if settings["scale"] is None else settings["scale"]
        q = query.view(rows, kv_heads, -1, size) * scale
        # All rows of a group at once against their prompt: (P, K, G * n, d) x (P, K, d, L).
        grouped = q[self._slots].view(prompts, -1, kv_heads, q.shape[2], size).transpose(1, 2)
        to_prompt = grouped.flatten(2, 3) @ prompt_k.permute(0, 2, 3, 1)
        to_prompt = to_prompt.view(*grouped.shape[:4], length).transpose(1, 2).flatten(0, 1)[self._places]
        scores = torch.cat([to_prompt, q @ own_k.transpose(2, 3)], -1)  # (R, K, n, L + t)
        if settings["softcap"] is not None:
            scores = (scores / settings["softcap"]).tanh() * settings["softcap"]
        bias = self._bias(settings["window"], length, own_k.shape[2], scores.dtype)
        weights = (scores if bias is None else scores + bias).softmax(
            -1, dtype=torch.promote_types(scores.dtype, torch.float32)
        )
        weights = weights.to(value.dtype)
        grouped = weights[..., :length][self._slots].view(prompts, -1, *weights.shape[1:3], length).transpose(1, 2)
        out = (grouped.flatten(2, 3) @ prompt_v.transpose(1, 2)).view(*grouped.shape[:4], -1)
        out = out.transpose(1, 2).flatten(0, 1)[self._places]
        return (out + weights[..., length:] @ own_v).flatten(1, 2)

    def _remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Buffers are (R, K, capacity, d) and grow by doubling: a cache that is copied for each token costs more than
        # the attention itself.
        if layer not in self._own:
            rows, heads, size = key.shape
            self._own[layer] = (
                key.new_empty(rows, heads, _FIRST_CAPACITY, size),
                value.new_empty(rows, heads, _FIRST_CAPACITY, value.shape[-1]),
            )
        k, v = self._own[layer]
        length = int(self._length)
        if k.shape[2] == length:
            k, v = torch.cat([k, torch.empty_like(k)], 2), torch.cat([v, torch.empty_like(v)], 2)
            self._own[layer] = (k, v)
        k[:, :, length] = key
        v[:, :, length] = value
        return k[:, :, : length + 1], v[:, :, : length + 1]

    def _plan(self) -> None:
        # slots: for each prompt, the rows it serves, filled up to the same number with row 0; places: where each row
        # is found in that list. padding: (R, L), True = a column of its prompt that is none.
        self._padding = (~self._prompt_mask)[self._owner]
        counts = torch.bincount(self._owner, minlength=len(self._prompt_mask))
        width, self._is_padded = torch.stack([counts.max(), self._padding.any()]).tolist()
        rows = torch.arange(len(self._owner), device=self._owner.device)
        self._places = self._owner * width + rows - (counts.cumsum(0) - counts)[self._owner]
        self._slots = torch.zeros(len(counts) * width, dtype=torch.long, device=rows.device)
        self._slots[self._places] = rows

    def _bias(self, window: int | None, length: int, own: int, dtype: torch.dtype) -> Tensor | None:
        # 0 where the new token may look, -inf where not; (R, 1, 1, L + t), the same for all layers of a step.
        if window not in self._bias_by_window:
            padding, hidden = self._padding, None
            if window is not None and window < length + own:
                column = torch.arange(length + own, device=padding.device)
                hidden = (column <= length + own - 1 - window)[None]
            if self._is_padded:
                padding = torch.cat([padding, padding.new_zeros(len(padding), own)], 1)
                hidden = padding if hidden is None else hidden | padding
            if hidden is not None:
                hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
                hidden = hidden[:, None, None]
            self._bias_by_window[window] = hidden
        return self._bias_by_window[window]


class RowMemory:
    """Transformers' cache, each row with its own copy of the prompt; used like `SharedMemory`."""

    def __init__(self, parts: PolicyParts, group_size: int) -> None:
        self._parts = parts
        self._group_size = group_size

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the prompts, see `SharedMemory.prefill`."""
        ids, self._mask = (x.repeat_interleave(self._group_size, 0) for x in (ids, mask))
        return self._run(ids, positions(self._mask))

    def step(self, token: Tensor) -> Tensor:
        """Append a token to each running row, see `SharedMemory.step`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], 1)
        return self._run(token[:, None], self._mask.sum(1, keepdim=True) - 1, past_key_values=self._cache)

    def keep(self, rows: Tensor) -> None:
        """Forget the rows that have ended, see `SharedMemory.keep`."""
        self._mask = self._mask[rows]
        self._cache.reorder_cache(rows)

    def _run(self, ids: Tensor, position: Tensor, **kwargs: Any) -> Tensor:
        states, self._cache = self._parts.decode(
            ids, attention_mask=self._mask, position_ids=position, use_cache=True, **kwargs
        )
        return self._parts.head(states[:, -1])
