"""Mean inputs at the start of answers, position by position: what all prompts that are trained on have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from nspo_lightning import ranks


class StartMeans:
    """Running means of a layer's inputs at the last token of a prompt (position 0) and the first of its answer.

    Args:
        width: Number of input features.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._sums = torch.zeros(0, width, dtype=torch.float64)
        self._counts = torch.zeros(0, dtype=torch.float64)

    @property
    def rows(self) -> int:
        """Rows so far."""
        return int(self._counts.sum())

    def update(self, rows: Tensor, positions: Tensor) -> None:
        """Add rows of shape ``(n, width)``; ``positions``, shape ``(m,)``, says where they stand, n/m rows for each."""
        repeated = positions.repeat_interleave(rows.shape[0] // max(positions.numel(), 1)).to(rows.device)
        self._grow(int(positions.max()) + 1 if positions.numel() else 0)
        added = torch.zeros(len(self._counts), self.width, dtype=torch.float64, device=rows.device)
        added.index_add_(0, repeated, rows.to(torch.float64))
        self._sums += added.cpu()
        self._counts += torch.bincount(repeated, minlength=len(self._counts)).cpu()

    def all_reduce(self) -> None:
        """Add up over ranks (cross-rank synchronisation)."""
        self._grow(max(ranks.gather_objects(len(self._counts))))
        self._sums = ranks.all_reduce_sum(self._sums)
        self._counts = ranks.all_reduce_sum(self._counts)

    def second_moment(self) -> Tensor:
        """Return sum_p m_p m_p^T over the positions' means, divided by their number; shape ``(width, width)``."""
        seen = self._counts > 0
        means = self._sums[seen] / self._counts[seen, None]
        return means.T @ means / max(len(means), 1)

    def _grow(self, positions: int) -> None:
        missing = positions - len(self._counts)
        if missing > 0:
            self._sums = torch.cat([self._sums, self._sums.new_zeros(missing, self.width)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(missing)])
