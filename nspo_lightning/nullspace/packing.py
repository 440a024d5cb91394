"""Many small projections as a few large ones.

A model has four adapter inputs a layer, so a step that projects each alone costs its time in launches. Here matrices
that share an input are stacked as rows (q, k and v: one basis, 3 r rows), and inputs of equal width and row count are
batched: one `bmm` pair for all of them, over bases padded with zero columns (which change nothing). How many pairs a
model needs is bounded by its shapes, however many layers it has.

Bases are kept once: each becomes a view of the stack that it is in, and its own memory is let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.projection import along

_PADDING_LIMIT = 1.25  # a stack may hold this much more than its bases ...
_SMALL_STACK = 2_000_000  # ... unless it is smaller than this many numbers (8 MB), where launches cost more


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One matrix in a pack."""

    index: int
    """Position in the caller's list of matrices."""
    rows: int


class Pack:
    """Matrices whose projections run as one batched product.

    Args:
        slots: The matrices, in the order in which their rows are stacked.
        bases: One for each entry, all of one width and form; their ``vectors`` become views of this pack's stack.
        rows: Rows of each entry.
    """

    def __init__(self, slots: Sequence[Slot], bases: Sequence[Basis], rows: int) -> None:
        self.slots = tuple(slots)
        self.entries, self.rows, self.width = len(bases), rows, bases[0].width
        self._weights: Tensor | None = None
        self._vectors = _stacked([basis.vectors for basis in bases])
        weights = [basis.weights for basis in bases if basis.weights is not None]
        if weights:
            self._weights = pad_sequence(weights, batch_first=True).unsqueeze(1)
        # Entries that store null directions keep M Z Z^T, the others M - M Z Z^T.
        self._complement = bases[0].complement
        self._factors: tuple[Tensor, Tensor] | None = None
        if len({basis.complement for basis in bases}) == 2:
            kept = self._vectors.new_tensor([[[float(basis.complement)]] for basis in bases])
            self._factors = 1 - kept, 2 * kept - 1

    def gather(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return this pack's matrices stacked, shape ``(entries, rows, width)``."""
        parts = [matrices[slot.index] for slot in self.slots]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        return stacked.view(self.entries, self.rows, self.width)

    def split(self, stacked: Tensor) -> list[Tensor]:
        """Return one view for each slot, in order: the inverse of `gather`."""
        flat = stacked.reshape(self.entries * self.rows, self.width)
        return list(torch.split(flat, [slot.rows for slot in self.slots]))

    def component(self, stacked: Tensor) -> Tensor:
        """Return the part along the stored directions, weighted in the soft form."""
        vectors, weights = self._vectors.to(stacked.dtype), self._weights
        if self.entries > 1:
            return along(stacked, vectors, weights)
        return along(stacked[0], vectors[0], None if weights is None else weights[0]).unsqueeze(0)

    def apply(self, stacked: Tensor) -> Tensor:
        """Return the projected (hard) or damped (soft) rows, shape ``(entries, rows, width)``."""
        inside = self.component(stacked)
        if self._factors is not None:
            whole, part = (factor.to(stacked.dtype) for factor in self._factors)
            return (stacked * whole).addcmul_(inside, part)
        return inside if self._complement else stacked - inside


def _stacked(vectors: Sequence[Tensor]) -> Tensor:
    """Return bases as one tensor, shape ``(entries, width, columns)``, that they share memory with from now on."""
    if len(vectors) == 1:
        return vectors[0].unsqueeze(0)
    stack = pad_sequence([v.T for v in vectors], batch_first=True).mT
    for own, packed in zip(vectors, stack, strict=True):
        own.data = packed[:, : own.shape[1]]  # whoever holds the basis sees the stack, so the copy can be let go
    return stack


def build_packs(rows: Sequence[int], bases: Sequence[Basis], keys: Sequence[object]) -> list[Pack]:
    """Arrange matrices into few packs.

    Args:
        rows: Rows of each matrix; matrices without rows (an empty shard) are left out.
        bases: The basis of each matrix.
        keys: Matrices with different keys are never batched (device, dtype).

    Returns:
        Packs that cover every matrix with rows exactly once.
    """
    shared: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        if rows[index]:
            shared.setdefault((key, id(bases[index])), []).append(index)
    alike: dict[tuple[object, ...], list[list[int]]] = {}
    for indices in shared.values():
        basis = bases[indices[0]]
        total = sum(rows[i] for i in indices)
        kind = (basis.width, total, basis.form, basis.vectors.device, basis.vectors.dtype)
        alike.setdefault((*kind, keys[indices[0]]), []).append(indices)
    packs = []
    for groups in alike.values():
        groups.sort(key=lambda indices: bases[indices[0]].vectors.shape[1])
        for run in _runs([bases[g[0]].vectors.shape[1] for g in groups], bases[groups[0][0]].width):
            members = [groups[i] for i in run]
            packs.append(_pack(members, rows, bases))
    return packs


def _pack(members: list[list[int]], rows: Sequence[int], bases: Sequence[Basis]) -> Pack:
    slots = [Slot(index=index, rows=rows[index]) for indices in members for index in indices]
    return Pack(slots, [bases[indices[0]] for indices in members], sum(rows[i] for i in members[0]))


def _runs(columns: list[int], width: int) -> list[list[int]]:
    """Return an ascending list of basis widths cut into runs that waste little padding."""
    runs: list[list[int]] = []
    for index, count in enumerate(columns):
        if runs:
            run = [*runs[-1], index]
            padded = len(run) * count * width
            if padded <= _SMALL_STACK or padded <= _PADDING_LIMIT * width * sum(columns[i] for i in run):
                runs[-1] = run
                continue
        runs.append([index])
    return runs
