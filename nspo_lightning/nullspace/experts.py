"""What enters the weights of a mixture of experts: fused parameters, which no module of their own reads.

The router and the experts' up projections read what enters the block, their down projections what the gated activation
makes of it. An `ExpertInputs` stands for one of these inputs: whenever the block runs it is called with it, so that
whoever listens to modules can listen to it. All experts share one input: what any of them reads is protected in all.

Neither peft nor transformers is imported. What the experts compute is computed again here, and compared with what they
gave, so that a module that only looks alike is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from nspo_lightning.nullspace.shapes import base_of

Part = Literal["gate_up_proj", "down_proj", "weight"]
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2  # of the outputs' norm; 16-bit kernels add up otherwise


class ExpertInputs(nn.Module):
    """Is called with the rows that a fused parameter reads, laid out as the block's input is.

    Args:
        block: The module whose input the experts and the router read.
        reader: The experts, or the router.
        part: Name of the parameter.
    """

    def __init__(self, block: nn.Module, reader: nn.Module, part: Part) -> None:
        super().__init__()
        self.in_features = reader.get_parameter(part).shape[-1]
        self.modules_read = (block, reader)  # in a tuple: they are no parts of this one
        self.part = part

    @classmethod
    def of(cls, model: nn.Module, name: str, part: str) -> ExpertInputs | None:
        """Return what stands for a parameter's input; None where its module is not known to be experts or a router.

        Args:
            model: The model.
            name: Of the module, or of an adapter around it.
            part: Name of the parameter in its module.
        """
        outer = name
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
        block, reader = model.get_submodule(outer.rpartition(".")[0]), base_of(model.get_submodule(name))
        shapes = {key: tuple(value.shape) for key, value in reader.named_parameters(recurse=False)}
        matrix = shapes.keys() == {"weight"} and len(shapes["weight"]) == 2 and not isinstance(reader, nn.Embedding)
        if part == "weight" and matrix:
            return cls(block, reader, "weight")
        up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
        known = len(shapes) == 2 and len(up) == len(down) == 3 and up[1:] == (2 * down[2], down[1])
        if known and "act_fn" in dict(reader.named_children()) and part in {"gate_up_proj", "down_proj"}:
            return cls(block, reader, "down_proj" if part == "down_proj" else "gate_up_proj")
        return None

    @property
    def device(self) -> torch.device:
        """Where the parameter is, and with it its input."""
        return self.modules_read[1].get_parameter(self.part).device

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return what the parameter makes of its input; listeners see both."""
        return outputs


class _Block:
    """Sees a block run: what its experts compute is computed again once, for all parts that are listened to."""

    def __init__(self, parts: Sequence[ExpertInputs]) -> None:
        self._parts = parts
        self._input: Tensor | None = None

    def listen(self) -> list[RemovableHandle]:
        block, reader = self._parts[0].modules_read
        return [block.register_forward_pre_hook(self._enter), reader.register_forward_hook(self._read)]

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0] if args and isinstance(args[0], Tensor) else None

    def _read(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs, whole = args[0], self._input
        self._input = None
        rows = inputs.reshape(-1, inputs.shape[-1])
        flat = inputs.ndim == 2 and whole is not None and whole.numel() == rows.numel()
        if flat and whole is not None and torch.equal(whole.reshape_as(rows), rows):
            inputs = whole  # else a mask that leaves rows out is refused; router and experts share it
        shape = inputs.shape[:-1]
        if self._parts[0].part == "weight":
            self._parts[0](inputs, functional.linear(inputs, _weight(reader, "weight")))
            return
        up, states, down = _experts(reader, rows, args[1])
        _compare(reader, (down * args[2].unsqueeze(-1)).sum(1), output)
        for part in self._parts:
            read, made = (states.view(*shape, *states.shape[1:]), down) if part.part == "down_proj" else (inputs, up)
            part(read, made.view(*shape, *made.shape[1:]))


def listen(modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Have each `ExpertInputs` among some modules called whenever its block runs, until the handles are removed."""
    parts: dict[nn.Module, list[ExpertInputs]] = {}
    for module in modules:
        if isinstance(module, ExpertInputs):
            parts.setdefault(module.modules_read[1], []).append(module)
    return [handle for of_reader in parts.values() for handle in _Block(of_reader).listen()]


def _experts(reader: nn.Module, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each row's experts compute, shape (rows, experts a row, features): up, activated, down."""
    activation: Callable[[Tensor], Tensor] = reader.get_submodule("act_fn")
    weights = _weight(reader, "gate_up_proj"), _weight(reader, "down_proj")
    width, (_, out, inner) = weights[0].shape[1], weights[1].shape
    up, states, down = (rows.new_zeros(*chosen.shape, size) for size in (width, inner, out))
    for expert in torch.unique(chosen).tolist():
        row, place = torch.where(chosen == expert)
        made = functional.linear(rows[row], weights[0][expert])
        gate, value = made.chunk(2, dim=-1)
        state = activation(gate) * value
        up[row, place] = made.to(up.dtype)
        states[row, place] = state.to(up.dtype)
        down[row, place] = functional.linear(state, weights[1][expert]).to(up.dtype)
    return up, states, down


def _weight(reader: nn.Module, name: str) -> Tensor:
    """Return a weight as it is used, with what a parametrization adds."""
    weight: Tensor = getattr(reader, name)
    return weight


def _compare(reader: nn.Module, mine: Tensor, output: Any) -> None:
    given = output.reshape_as(mine) if isinstance(output, Tensor) and output.numel() == mine.numel() else None
    norm = math.inf if given is None else float((given - mine).norm() / given.norm().clamp_min(1e-30))
    exact = not torch.is_autocast_enabled(mine.device.type) and mine.dtype.itemsize >= 4
    if not norm <= (_TOLERANCE if exact else _HALF_TOLERANCE):
        raise ValueError(
            f"{type(reader).__name__} computes something else than down(act(gate) * up) for each expert: what enters "
            "its weights is not known. Leave the experts out (`target_modules` of the adapter), or freeze them."
        )
