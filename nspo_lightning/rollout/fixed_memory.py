"""Shared keys and values in shapes that stay from step to step, so that a step can be captured and run again."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from nspo_lightning.rollout.memory import SharedMemory


class FixedMemory(SharedMemory):
    """`SharedMemory` whose buffers have a fixed capacity; columns not written yet are masked, not cut off.

    Between two calls of `reserve` or `keep` a step changes no shape, replaces no tensor that the next step reads, and
    never waits for the device: where it writes is decided by `drawn`, a tensor.

    Attributes:
        drawn: Shape (1,), int64, tokens that each row's logits already follow: 0 behind `prefill`, then steps taken.
        capacity: Tokens a row that there is room for.
    """

    drawn: Tensor
    capacity = 0

    @override
    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = super().prefill(ids, mask)
        self.drawn = self._length = torch.zeros(1, dtype=torch.long, device=ids.device)
        return logits

    def reserve(self, capacity: int) -> None:
        """Make room for this many tokens a row; to be called before the first step."""
        # Zeros, not whatever was there: a masked column has weight 0, and 0 times NaN would be NaN.
        rows, more = len(self._owner), capacity - self.capacity
        for layer, prompt in self._prompts.items():
            new = [x.new_zeros(rows, x.shape[2], more, x.shape[3]) for x in prompt]
            k, v = self._own.get(layer, (None, None))
            self._own[layer] = (
                new[0] if k is None else torch.cat([k, new[0]], 2),
                new[1] if v is None else torch.cat([v, new[1]], 2),
            )
        self.capacity = capacity

    @override
    def _remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._own[layer]
        k.index_copy_(2, self.drawn, key[:, :, None])
        v.index_copy_(2, self.drawn, value[:, :, None])
        return k, v

    @override
    def _bias(self, window: int | None, length: int, own: int, dtype: torch.dtype) -> Tensor:
        bias = self._bias_by_window.get(window)
        if bias is None:
            column = torch.arange(length + own, device=self.drawn.device)
            last = self.drawn + length  # the column of the new token
            hidden = column > last
            if window is not None:
                hidden = hidden | (column <= last - window)
            padding = torch.cat([self._padding, self._padding.new_zeros(len(self._padding), own)], 1)
            bias = torch.zeros(padding.shape, dtype=dtype, device=column.device)
            bias = bias.masked_fill_(hidden | padding, -torch.inf)[:, None, None]
            self._bias_by_window[window] = bias
        return bias
