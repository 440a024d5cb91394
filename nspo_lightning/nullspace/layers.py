"""Which trainable matrices can be held inside a null space, and which parameters cannot.

Refusals name the parameter, say what it would move, and how to go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.experts import ExpertInputs
from nspo_lightning.nullspace.shapes import Adapter, base_of, is_conv1d, weight_of

Kind = Literal["lora", "dense", "dense_transposed"]


@dataclass(kw_only=True, eq=False)
class ProtectedLayer:
    """One trainable matrix and the module whose inputs it acts on."""

    name: str
    """Name of the layer in the model (with ``[adapter]`` where a layer has several trained adapters)."""
    module: nn.Module
    """The module whose input is collected."""
    kind: Kind
    """``lora``: A of an adapter. ``dense``: a weight (out x in). ``dense_transposed``: GPT-2's Conv1D (in x out)."""
    matrix: nn.Parameter
    """A or W."""
    output: nn.Parameter | None = None
    """B of the adapter."""
    scale: float = 1.0
    """s in W' = W + s B A."""
    experts: int = 1
    """Experts that A and B hold side by side: A has r rows for each, B's columns are those of rank 1 of all, then 2."""

    @property
    def width(self) -> int:
        """Input features."""
        return self.matrix.shape[0] if self.kind == "dense_transposed" else self.matrix.shape[-1]

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor shaped like ``matrix`` as a matrix with input features last."""
        if self.kind == "dense_transposed":
            return tensor.T
        return tensor if tensor.ndim == 2 else tensor.view(-1, tensor.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A trainable parameter that moves protected outputs and cannot be projected."""

    name: str
    parameter: nn.Parameter
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}. {self.cure}"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is held in place and what cannot be."""

    layers: tuple[ProtectedLayer, ...]
    refusals: tuple[Refusal, ...]

    def held(self) -> set[int]:
        """Return the ids of the parameters that the layers cover."""
        return {id(p) for layer in self.layers for p in (layer.matrix, layer.output) if p is not None}


def plan_layers(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    *,
    covered_elsewhere: frozenset[int] = frozenset(),
    resumed: bool = False,
) -> LayerPlan:
    """Sort a model's trainable parameters into matrices to project and parameters to refuse.

    Args:
        model: Any module; names in the result are relative to it.
        target_modules: None = every module; a string is a regular expression for the full module name; a list holds
            names, name endings or parents ("policy", "q_proj", "encoder.layers").
        covered_elsewhere: Ids of parameters that another callback protects.
        resumed: Adapters may have B != 0, because A lies in the null space already.

    Returns:
        Layers and refusals; together with ``covered_elsewhere`` they hold every trainable parameter once.
    """
    layers: list[ProtectedLayer] = []
    refusals: list[Refusal] = []
    owners = _owners(model)
    seen: set[int] = set(covered_elsewhere)
    for name, module in model.named_modules():
        if not matches(name, target_modules):
            continue
        if (adapter := Adapter.of(module)) is not None:
            found, refused = _adapter_layers(model, name, adapter, resumed)
        elif _is_dense(module) and not _inside_adapter(name):
            found, refused = _dense_layer(name, module, owners)
        elif (_is_experts(module) or _is_router(model, name)) and not _inside_adapter(name):
            found, refused = _expert_layers(model, name, module), []
        else:
            continue
        plan = LayerPlan(layers=tuple(found), refusals=tuple(refused))
        taken = plan.held() | {id(refusal.parameter) for refusal in refused}
        if taken & seen:
            continue
        seen |= taken
        layers += found
        refusals += refused
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            refusals.append(_refuse(name, parameter, target_modules))
    return LayerPlan(layers=tuple(layers), refusals=tuple(refusals))


def check_targets(target_modules: str | Sequence[str] | None, setting: str = "target_modules") -> None:
    """Refuse what can't be read as targets (see `plan_layers`), before anything long.

    Args:
        target_modules: As given.
        setting: What they are called there.

    Raises:
        ValueError: For a string that is no regular expression.
    """
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as problem:
            raise ValueError(
                f"`{setting}` is a regular expression where it is a string, and {target_modules!r} is none: "
                f"{problem}. For names of modules give a list: [{target_modules!r}]."
            ) from None


def matches(name: str, target_modules: str | Sequence[str] | None) -> bool:
    """Return whether a module name is among the targets (see `plan_layers`)."""
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(
        name == t or name.endswith("." + t) or name.startswith(t + ".") or f".{t}." in name for t in target_modules
    )


def _is_dense(module: nn.Module) -> bool:
    weight = weight_of(module)
    trained = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.requires_grad
    return trained and (isinstance(module, nn.Linear) or is_conv1d(module))


def _inside_adapter(name: str) -> bool:
    return bool(re.search(r"(^|\.)(lora_[A-Za-z_]+|modules_to_save)(\.|$)", name))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
    return owners


def _is_experts(module: nn.Module) -> bool:
    return any(p.ndim == 3 and p.requires_grad for p in module.parameters(recurse=False))


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether a module stands beside experts: a matrix of its own there is the router's."""
    return any(p.ndim == 3 for m in model.get_submodule(name.rpartition(".")[0]).children() for p in _own(m))


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return base_of(module).parameters(recurse=False)


def _expert_layers(model: nn.Module, name: str, module: nn.Module) -> list[ProtectedLayer]:
    """Return weights of experts or a router that can be held; the others are refused as what no layer owns."""
    layers = []
    for part, parameter in module.named_parameters(recurse=False):
        inputs = ExpertInputs.of(model, name, part)
        if parameter.requires_grad and inputs is not None:
            layers.append(ProtectedLayer(name=f"{name}.{part}", module=inputs, kind="dense", matrix=parameter))
    return layers


def _adapter_layers(
    model: nn.Module, name: str, adapter: Adapter, resumed: bool
) -> tuple[list[ProtectedLayer], list[Refusal]]:
    layers: list[ProtectedLayer] = []
    refusals: list[Refusal] = []
    trained = [key for key, down, up in adapter.pairs() if _trainable(down, up)]
    module: nn.Module | None = adapter.module
    if adapter.raw_parameter is not None:
        module = ExpertInputs.of(model, name, adapter.raw_parameter) if trained else None
    for key in trained:
        down, up = adapter.down[key], adapter.up[key]
        if module is None:
            obstacle: tuple[str, str] | None = _NO_INPUT
        else:
            obstacle = _rounded(adapter) or _adapter_obstacle(adapter, key, down, up, resumed)
        if obstacle is None and module is not None:
            label = f"{name}[{key}]" if len(trained) > 1 else name
            scale = adapter.scaling.get(key, 1.0)
            a, b = down.get_parameter("weight"), up.get_parameter("weight")
            layers.append(
                ProtectedLayer(
                    name=label, module=module, kind="lora", matrix=a, output=b, scale=scale, experts=adapter.experts
                )
            )
            continue
        reason, cure = obstacle or _NO_INPUT
        refusals += [
            Refusal(name=f"{name}.{part}.{key}.{parameter_name}", parameter=parameter, reason=reason, cure=cure)
            for part, inner in (("lora_A", down), ("lora_B", up))
            for parameter_name, parameter in inner.named_parameters()
            if parameter.requires_grad
        ]
    return layers, refusals


_ATTENTION = "adapt attention layers alone, by name (LoRA: `target_modules: [q_proj, k_proj, v_proj, o_proj]`)"
_NO_INPUT = (
    "it adapts a raw parameter (mixture-of-experts weights of a form that is not known), whose inputs no module shows",
    f"Instead {_ATTENTION}",
)


def _rounded(adapter: Adapter) -> tuple[str, str] | None:
    """Return why an update that is added to a raw weight cannot be held there, as for `_adapter_obstacle`."""
    if adapter.raw_parameter is None:
        return None
    dtype = base_of(adapter.module).get_parameter(adapter.raw_parameter).dtype
    if dtype in (torch.float32, torch.float64):
        return None
    return (
        f"its update is added to the raw parameter {adapter.raw_parameter!r} and rounded to {dtype} in each forward, "
        "which leaks about 4e-3 of it",
        f"Load the model in float32, or {_ATTENTION}",
    )


def _trainable(*modules: nn.Module) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def _adapter_obstacle(
    adapter: Adapter, key: str, down: nn.Module, up: nn.Module, resumed: bool
) -> tuple[str, str] | None:
    """Return why an adapter's update cannot be held, and the way out; None where nothing stands in the way."""
    if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
        return ("it is an adapter of a convolution, not of a linear map", "Leave convolutions out of `target_modules`")
    if key in adapter.doras:
        return (
            "DoRA rescales whole rows of W + s B A, so outputs on protected inputs move with any A",
            "Train without `use_dora`",
        )
    if (variant := adapter.variants.get(key)) is not None:
        return (
            f"it is the LoRA variant {type(variant).__name__}, whose update is not s B A",
            "Use vanilla LoRA or rsLoRA",
        )
    if adapter.in_features not in (None, down.weight.shape[1]):
        return ("A acts on a transformed input", "Use vanilla LoRA or rsLoRA")
    if not resumed and up.weight.requires_grad and ranks.any_nonzero(up.weight):
        return (
            "B is not zero: projecting A would change what the model does, and leaving A as it is would leak with each "
            "change of B",
            "Merge the adapter into its base first (`merge_and_unload`) and start a new one, or freeze B "
            "(`requires_grad_(False)`)",
        )
    return None


def _dense_layer(
    name: str, module: nn.Module, owners: dict[int, list[str]]
) -> tuple[list[ProtectedLayer], list[Refusal]]:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)  # `_is_dense` made sure
    users = owners[id(weight)]
    if len(users) > 1:
        return [], [
            Refusal(
                name=users[0],
                parameter=weight,
                reason=f"it is shared with {', '.join(users[1:])}, and one update cannot be null for several inputs",
                cure="Untie the weights (`tie_word_embeddings=False`) or freeze it",
            )
        ]
    kind: Kind = "dense" if isinstance(module, nn.Linear) else "dense_transposed"
    return [ProtectedLayer(name=name, module=module, kind=kind, matrix=weight)], []


_BY_NAME: tuple[tuple[str, str, str], ...] = (
    ("lora_magnitude_vector", "DoRA's magnitude rescales outputs on protected inputs", "Train without `use_dora`"),
    ("lora_embedding_", "an embedding adapter moves the inputs of every layer", "Leave embeddings out of the adapter"),
    ("modules_to_save", "it is a full copy outside the adapter", "Drop `modules_to_save` from the LoRA config"),
    ("trainable_tokens", "trained tokens move the inputs of every layer", "Drop `trainable_token_indices`"),
)


def _refuse(name: str, parameter: nn.Parameter, target_modules: str | Sequence[str] | None) -> Refusal:
    for word, reason, cure in _BY_NAME:
        if word in name:
            return Refusal(name=name, parameter=parameter, reason=reason, cure=cure)
    if target_modules is not None and not matches(name.rpartition(".")[0], target_modules):
        reason, cure = "it is trained but lies outside `target_modules`", "Add its module, or freeze it"
    elif name.endswith("bias"):
        reason = "a trained bias moves the outputs on every input"
        cure = "Freeze it (LoRA: bias='none', lora_bias=False)"
    elif parameter.ndim == 3:
        reason = f"its shape {tuple(parameter.shape)} is that of several experts' weights, whose inputs no module shows"
        cure = "Freeze it"
    elif parameter.ndim == 1:
        reason, cure = "a trained scale (normalisation) moves the outputs on every input", "Freeze it"
    else:
        reason = f"a parameter of shape {tuple(parameter.shape)} that no linear layer owns cannot be projected"
        cure = "Freeze it, or train linear layers or LoRA adapters only"
    return Refusal(name=name, parameter=parameter, reason=reason, cure=cure)
