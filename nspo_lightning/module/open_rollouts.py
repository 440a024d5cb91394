"""The rollouts that are being learnt from: one, or with accumulation one for each batch of the window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch

from nspo_lightning.module.experience import ExperienceBuffer

_NUMBER = "batch_number"


class OpenRollouts:
    """Rollouts with steps left, by the number of the batch that they were made of.

    A batch without a number takes the rollout without one, of which there is one at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[int | None, ExperienceBuffer] = {}

    def get(self, number: int | None) -> ExperienceBuffer | None:
        """Return a batch's rollout; None if there is none, or it has given all its steps."""
        buffer = self._buffers.get(number)
        return None if buffer is None or buffer.is_empty else buffer

    def put(self, number: int | None, buffer: ExperienceBuffer, at_most: int) -> None:
        """Add a batch's rollout. What is over `at_most` then was left behind, by an epoch that was cut short."""
        kept = {key: one for key, one in self._buffers.items() if key != number and not one.is_empty}
        while len(kept) >= at_most:
            del kept[next(iter(kept))]
        self._buffers = {**kept, number: buffer}

    def snapshot(self) -> OpenRollouts:
        """Copy the places in the rollouts; tensors are shared."""
        result = OpenRollouts()
        result._buffers = {number: copy(buffer) for number, buffer in self._buffers.items()}
        return result

    def state_dict(self) -> list[dict[str, Any]]:
        """Return plain tensors and values on the CPU, for checkpoints."""
        left = {number: buffer for number, buffer in self._buffers.items() if not buffer.is_empty}
        return [{_NUMBER: number, **buffer.state_dict()} for number, buffer in left.items()]

    @classmethod
    def from_state_dict(
        cls, state: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None, device: torch.device
    ) -> OpenRollouts:
        """Make them again on a device; earlier checkpoints hold one rollout without a number, or None."""
        result = cls()
        for one in [state] if isinstance(state, Mapping) else state or []:
            values = dict(one)
            number = values.pop(_NUMBER, None)
            result._buffers[number] = ExperienceBuffer.from_state_dict(values, device)
        return result
