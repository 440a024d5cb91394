"""Fingerprints that say whether a stored basis belongs to this model, this text and these settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.shapes import base_of

FORMAT_VERSION = 3
_ADAPTER = re.compile(r"(^|\.)lora_[A-Za-z_]+\.")
_PAIR = re.compile(r"((?:^|\.)lora(?:_embedding)?)_[AB]\.")
_AROUND = re.compile(r"(^|\.)base_layer\.")


@runtime_checkable
class PlainConfig(Protocol):
    """The configuration of a model, as transformers has it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""


def model_fingerprint(model: nn.Module, layers: Iterable[str], precision: str = "") -> dict[str, str]:
    """Return digests of all that decides what enters the layers: weights, buffers, configuration, precision.

    They are those of the function that the model is, whatever of it trains: the same model has the same ones with
    fewer layers held, and with an adapter that has no effect yet.

    Args:
        model: The whole model; a layer's inputs depend on all that stands before it, trained or not.
        layers: Names of the layers that a basis is of, see `plan_layers`.
        precision: The Trainer's, "" = not known.

    Returns:
        Hexadecimal digests. ``structure``: names, widths and kinds of the layers; ``weights``: all parameters, but for
        adapters without effect; ``buffers``; ``configuration``; and ``precision`` as it is.
    """
    structure = hashlib.sha256()
    for name in sorted(layers):
        structure.update(f"{name}|{_kind(model, name)}\n".encode())
    configurations = {_plain_name(name): _configuration(module) for name, module in model.named_modules()}
    found = {
        "structure": structure.hexdigest()[:32],
        "weights": _digest(_in_effect(dict(model.named_parameters()))),
        "buffers": _digest({_plain_name(name): buffer for name, buffer in model.named_buffers()}),
        "configuration": combined({name: value for name, value in configurations.items() if value}),
    }
    return found | ({"precision": precision} if precision else {})


def _kind(model: nn.Module, layer: str) -> str:
    """Say what a layer is, by the name that `plan_layers` gave it: of a module, or of a parameter of one."""
    name = layer.partition("[")[0]
    for place in (name, name.rpartition(".")[0]):
        with contextlib.suppress(AttributeError):
            base = base_of(model.get_submodule(place))
            return f"{vars(base).get('in_features')}|{type(base).__name__}"
    return "not there"


def _in_effect(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters by their name without adapters around them; adapters whose A or B is zero are left out."""
    return {_plain_name(name): value for name, value in parameters.items() if _has_effect(name, parameters)}


def _has_effect(name: str, parameters: Mapping[str, Tensor]) -> bool:
    if not _ADAPTER.search(name):
        return True
    pair = [parameters.get(_PAIR.sub(rf"\1_{side}.", name)) for side in "AB"]
    return all(parameter is None or ranks.any_nonzero(parameter) for parameter in pair)


def _plain_name(name: str) -> str:
    return _AROUND.sub(r"\1", name)


def _configuration(module: nn.Module) -> dict[str, Any]:
    """Return how a model of transformers computes, without where it came from."""
    config = vars(module).get("config")
    values = config.to_dict() if isinstance(config, PlainConfig) else {}
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach()
        digest.update(f"{name}|{tuple(plain.shape)}|{plain.dtype}\n".encode())
        # A sharded weight differs by rank, and one on the meta device has no values: only the shape enters.
        if ranks.local_part(plain) is plain and plain.device.type != "meta":
            digest.update(memoryview(_bytes(plain.cpu().contiguous())))
    return digest.hexdigest()[:32]


def data_fingerprint(tensors: Iterable[Tensor], domains: Iterable[str] = ()) -> str:
    """Return a digest of calibration tensors (token ids and masks) and of their domains' names, in order."""
    digest = hashlib.sha256("|".join(domains).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
        digest.update(_bytes(plain))
    return digest.hexdigest()[:32]


def combined(parts: Mapping[str, Any]) -> str:
    """Return one short digest of a fingerprint, used as a file name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two fingerprints, in words, ignoring keys that only one of them has.

    Example:
        >>> differences({"data": "a", "settings": {"criterion": "auto"}}, {"settings": {"criterion": "energy"}})
        ["settings.criterion: the file has 'auto', this run wants 'energy'"]
    """
    found = []
    for key in sorted(set(stored) & set(wanted)):
        a, b = stored[key], wanted[key]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: the file has {a!r}, this run wants {b!r}")
    return found


def _bytes(tensor: Tensor) -> Any:
    """Return a tensor's memory, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
