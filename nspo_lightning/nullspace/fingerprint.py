"""Fingerprints that say whether a stored basis belongs to this model, this text and these settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.shapes import base_of, weight_of

FORMAT_VERSION = 1
_SAMPLES = 64  # numbers of each weight that enter the fingerprint: enough to tell checkpoints apart, free to compute


def model_fingerprint(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return digests of the layers' names and shapes, and of a sample of their frozen weights.

    Args:
        modules: Layer name -> module (an adapter's base weight is sampled, never the adapter).

    Returns:
        ``structure`` and ``weights``, hexadecimal.
    """
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, module in modules.items():
        base = base_of(module)
        weight = weight_of(base)
        structure.update(f"{name}|{vars(module).get('in_features')}|{type(base).__name__}\n".encode())
        if weight is not None and weight.device.type != "meta":
            weights.update(_sample(weight))
    return {"structure": structure.hexdigest()[:32], "weights": weights.hexdigest()[:32]}


def data_fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of calibration tensors (token ids and masks), in order."""
    digest = hashlib.sha256()
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


def _sample(weight: Tensor) -> bytes:
    plain = weight.detach()
    if ranks.local_part(plain) is not plain:
        return str(tuple(plain.shape)).encode()  # a sharded weight differs by rank: only its shape enters
    flat = plain.reshape(-1)
    step = max(flat.numel() // _SAMPLES, 1)
    return _bytes(flat[::step].cpu().contiguous())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
