"""What a result is about: model, adapter, data, judge, decoding, seeds, versions. Every result file holds it."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nspo_lightning.compat.peft import is_lora_parameter, name_in_base
from nspo_lightning.keys import looks_secret, mask_keys
from nspo_lightning.policy.base_record import gguf_identity
from nspo_lightning.policy.chat_template import chat_template_hash
from nspo_lightning.policy.settings import PolicySettings

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


class _HasPolicy(Protocol):
    """A module whose policy gets named."""

    @property
    def policy_settings(self) -> PolicySettings: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def versions() -> dict[str, str]:
    """Return package to version, with `python` and the kernel's machine; packages that are missing are left out."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def trained_weights_hash(module: _HasPolicy) -> str:
    """Name a trained state: 16 hex digits of a hash over names and values of the trainable parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(_bytes(parameter))
    return digest.hexdigest()[:16]


def policy_fingerprint(policy: nn.Module) -> str:
    """Name the frozen base: 16 hex digits of a hash over its parameters' names, shapes and first 256 values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if not is_lora_parameter(name):
            digest.update(f"{name_in_base(name)}{tuple(parameter.shape)}".encode())
            digest.update(_bytes(parameter.detach().reshape(-1)[:256]))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def policy_identity(module: _HasPolicy, checkpoint: str | None) -> dict[str, Any]:
    """Return which policy it is: `model` and `adapter`, with the checkpoint that it was loaded from, if any."""
    settings = module.policy_settings
    return {
        "model": {
            "path": settings.path,
            "revision": settings.revision,
            "fingerprint": module.fingerprint,
            "quantization": settings.quantization,
            "dtype": settings.dtype,
            "chat_template": chat_template_hash(module.tokenizer),
            "chat_template_kwargs": settings.chat_template_kwargs,
            **gguf_identity(settings),
        },
        "adapter": {
            "checkpoint": checkpoint,
            "settings": None if settings.lora is None else asdict(settings.lora),
            "weights": trained_weights_hash(module),
        },
    }


def rows_hash(rows: Iterable[Any]) -> str:
    """Name a set of `PromptRow`s: 16 hex digits of a hash over what they say, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.key}\x00{row.answer}\x00{row.skill}\x01".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def data_identity(datamodule: Any, split: str) -> dict[str, Any]:
    """Return which rows of an `AlignmentDataModule`'s split a result is about, and the sources with their revisions.

    Of each evaluation loader that is the number of rows, their hash and their sources.
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
    """Return what JSON can hold of a judge or settings: class and plain attributes, but none that look like secrets."""
    if isinstance(thing, str):
        return mask_keys(thing)
    if thing is None or isinstance(thing, (int, float, bool)):
        return thing
    if isinstance(thing, dict):
        return {mask_keys(str(key)): describe(value) for key, value in thing.items() if not looks_secret(str(key))}
    if isinstance(thing, (list, tuple)):
        return [describe(value) for value in thing]
    if is_dataclass(thing) and not isinstance(thing, type):
        return describe(asdict(thing))
    attributes = vars(thing) if hasattr(thing, "__dict__") else {}
    plain = {
        name: describe(value)
        for name, value in sorted(attributes.items())
        if not name.startswith("_")
        and not looks_secret(name)
        and (value is None or isinstance(value, (str, int, float, bool, dict, list, tuple)) or is_dataclass(value))
    }
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **plain}
