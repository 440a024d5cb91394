"""How far training has moved a model's weights: ||D||_F over all trained matrices, without ever forming D.

Methods that forget less may simply have moved less. With D = s (B A - B0 A0) for an adapter that started at A0 and B0,
and D = W - W0 for a full weight, this is the length that a distance between outputs can be held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.diagnostics import low_rank_norm
from nspo_lightning.nullspace.layers import ProtectedLayer, plan_layers


class Movement:
    """Measures ||D||_F since it was made.

    Args:
        model: Where layers are looked for, see `plan_layers`.
        start: What `state_dict` returned, of an earlier process: D is counted from there on; None = from now.

    Attributes:
        uncounted: Names of trained parameters that no layer covers (biases, DoRA's magnitudes, ...).
    """

    def __init__(self, model: nn.Module, start: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        plan = plan_layers(model, resumed=True)
        self.uncounted = tuple(refusal.name for refusal in plan.refusals)
        self._layers = plan.layers
        found = {layer.name: _start(layer) for layer in plan.layers} if start is None else dict(start)
        self._start = {name: {part: value.cpu() for part, value in parts.items()} for name, parts in found.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return layer -> what it started from: nothing for an adapter whose B was zero."""
        return self._start

    @torch.no_grad()
    def norm(self) -> float:
        """Return the root of the sum, over layers, of ||D||_F^2, in float64; all ranks must ask together."""
        return math.hypot(*(_norm(layer, self._start.get(layer.name, {})) for layer in self._layers))


def _start(layer: ProtectedLayer) -> dict[str, Tensor]:
    matrix = ranks.full_tensor(layer.matrix.detach())
    if layer.output is None:
        return {"matrix": matrix.clone()}
    up = ranks.full_tensor(layer.output.detach())
    return {"matrix": matrix.clone(), "output": up.clone()} if bool(up.any()) else {}


def _norm(layer: ProtectedLayer, start: Mapping[str, Tensor]) -> float:
    matrix = ranks.full_tensor(layer.matrix.detach())
    began = {part: value.to(matrix.device) for part, value in start.items()}
    if layer.output is None:
        return float(torch.linalg.vector_norm((matrix - began["matrix"]).to(torch.float64)))
    up, down, experts = ranks.full_tensor(layer.output.detach()), layer.rows(matrix), layer.experts
    if began:  # B A - B0 A0 is one product of twice the rank
        up = torch.cat([up, -began["output"]], dim=1)
        parts = [rows.reshape(experts, -1, layer.width) for rows in (down, layer.rows(began["matrix"]))]
        down = torch.cat(parts, dim=1).flatten(0, 1)
    return abs(layer.scale) * low_rank_norm(up, down, experts)
