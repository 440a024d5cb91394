"""What a result is about: model, adapter, data, judge, decoding, seeds, versions. Every result file holds it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning.keys import looks_secret

PACKAGES = (
    "nspo-lightning",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "torchmetrics",
    "lm-eval",
)


def versions() -> dict[str, str]:
    """List what is installed.

    Returns:
        Package to version, `python` and the kernel's machine among them; packages that are missing are left out.
    """
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def trained_weights_hash(module: nn.Module) -> str:
    """Name a trained state.

    Args:
        module: Its trainable parameters count.

    Returns:
        16 hex digits of a hash over names and values.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rows_hash(rows: Iterable[Any]) -> str:
    """Name a set of rows by what they say, in their order.

    Args:
        rows: `PromptRow`s.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.key}\x00{row.answer}\x00{row.skill}\x01".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def policy_identity(module: Any, checkpoint: str | None) -> dict[str, Any]:
    """Say which policy it is.

    Args:
        module: A `PolicyModule` with its policy loaded.
        checkpoint: What the adapter was loaded from; None = it was not.

    Returns:
        `model` and `adapter`.
    """
    settings = module.policy_settings
    return {
        "model": {
            "path": settings.path,
            "revision": settings.revision,
            "fingerprint": module.fingerprint,
            "quantization": settings.quantization,
            "dtype": settings.dtype,
        },
        "adapter": {
            "checkpoint": checkpoint,
            "settings": None if settings.lora is None else asdict(settings.lora),
            "weights": trained_weights_hash(module),
        },
    }


def data_identity(datamodule: Any, split: str) -> dict[str, Any]:
    """Say which rows a result is about.

    Args:
        datamodule: An `AlignmentDataModule`.
        split: Which.

    Returns:
        Each evaluation loader's number of rows, their hash and their sources; the sources with their revisions.
    """
    loaders = {
        name: {"rows": len(rows), "sha256": rows_hash(rows), "sources": sorted({row.source for row in rows})}
        for name, rows in zip(datamodule.eval_names, datamodule.eval_rows(split), strict=True)
    }
    sources = [
        {"path": s.label, "preset": s.preset, "name": s.name, "split": s.split, "revision": s.revision}
        for part in (datamodule.safety, datamodule.general)
        for s in part.all_sources
    ]
    return {"split": split, **loaders, "sources": sources}


def describe(thing: Any) -> Any:
    """Say which judge or setting an object is: its class and its plain attributes.

    Args:
        thing: Any object.

    Returns:
        Something that JSON can hold. Names that look like secrets are left out.
    """
    if thing is None or isinstance(thing, (str, int, float, bool)):
        return thing
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items() if not looks_secret(str(key))}
    if isinstance(thing, (list, tuple)):
        return [describe(value) for value in thing]
    if is_dataclass(thing) and not isinstance(thing, type):
        return describe(asdict(thing))
    plain = {
        name: describe(value)
        for name, value in sorted(getattr(thing, "__dict__", {}).items())
        if not name.startswith("_")
        and not looks_secret(name)
        and (value is None or isinstance(value, (str, int, float, bool, dict, list, tuple)) or is_dataclass(value))
    }
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **plain}


def policy_fingerprint(policy: nn.Module) -> str:
    """Name the frozen base: a hash of its parameters' names and shapes and of the values of its small ones.

    Args:
        policy: The policy; adapters don't count.

    Returns:
        16 hex digits, the same in every process that loads the same base.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if "lora_" in name:
            continue
        digest.update(
            f"{name.replace('base_model.model.', '').replace('base_layer.', '')}{tuple(parameter.shape)}".encode()
        )
        values: Tensor = parameter.detach().reshape(-1)[:256].cpu()
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
