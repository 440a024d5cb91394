"""Fingerprints that say whether a stored basis belongs to this model, this text and these settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.shapes import base_of

FORMAT_VERSION = 2
_ADAPTER = re.compile(r"(^|\.)lora_[A-Za-z_]+\.")


@runtime_checkable
class PlainConfig(Protocol):
    """The configuration of a model, as transformers has it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""


def model_fingerprint(model: nn.Module, modules: Mapping[str, nn.Module], precision: str = "") -> dict[str, str]:
    """Return digests of all that decides what enters the layers: weights, buffers, configuration, precision.

    Args:
        model: The whole model; a layer's inputs depend on all that stands before it, trained or not.
        modules: Layer name -> module, of the layers that are held.
        precision: The Trainer's, "" = not known.

    Returns:
        Hexadecimal digests. ``structure``: names, widths and kinds of the layers; ``weights``: parameters that do not
        train; ``trained``: those that do, but for adapters, which begin without effect; ``buffers``; ``configuration``;
        and ``precision`` as it is.
    """
    structure = hashlib.sha256()
    for name, module in modules.items():
        structure.update(f"{name}|{vars(module).get('in_features')}|{type(base_of(module)).__name__}\n".encode())
    parameters = dict(model.named_parameters())
    trained = {n: p for n, p in parameters.items() if p.requires_grad and not _ADAPTER.search(n)}
    frozen = {n: p for n, p in parameters.items() if not p.requires_grad}
    configurations = {name: _configuration(module) for name, module in model.named_modules()}
    found = {
        "structure": structure.hexdigest()[:32],
        "weights": _digest(frozen),
        "trained": _digest(trained),
        "buffers": _digest(dict(model.named_buffers())),
        "configuration": combined({name: value for name, value in configurations.items() if value}),
    }
    return found | ({"precision": precision} if precision else {})


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
