"""Which base a trained state belongs to: noted in checkpoints and beside adapters, compared before either is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nspo_lightning.policy.gguf import content_hash, find_gguf
from nspo_lightning.policy.settings import PolicySettings

RECORD = "nspo_base.json"
"""Beside an adapter's weights."""
_NAMED = {
    "gguf_sha256": "content of the GGUF file (SHA-256)",
    "quantization": "`policy.quantization`",
    "double_quantization": "`policy.double_quantization`",
    "dtype": "`policy.dtype`",
    "path": "`policy.path`",
    "revision": "`policy.revision`",
    "gguf": "name of the GGUF file",
}


def gguf_identity(settings: PolicySettings) -> dict[str, str]:
    """Return which GGUF file a policy is, by name and content; empty where it is none."""
    file = find_gguf(settings.model_path, settings.gguf_file, settings.revision)
    return {} if file is None else {"gguf": file.name, "gguf_sha256": content_hash(file)}


def base_record(settings: PolicySettings, fingerprint: str) -> dict[str, Any]:
    """Return what to note of a loaded base."""
    return {"fingerprint": fingerprint, "path": settings.path, **_kind(settings), **gguf_identity(settings)}


def _kind(settings: PolicySettings) -> dict[str, Any]:
    """Return what of a base its settings alone say."""
    return {
        "revision": settings.revision,
        "quantization": settings.quantization,
        "double_quantization": settings.double_quantization and settings.quantization != "none",
        "dtype": settings.dtype,
    }


def base_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Compare two bases by their weights' fingerprint, and by the content of the GGUF file where both are one.

    Args:
        saved: As `base_record` gave it, or a part of that.
        now: The same of the base at hand.

    Returns:
        Each setting that differs; "" if the bases are one, whatever paths and names say.
    """
    keys = ("fingerprint", "gguf_sha256")
    if not any(key in saved and key in now and saved[key] != now[key] for key in keys):
        return ""
    return _named(saved, now) or (
        f"the settings are the same, the weights at '{now['path']}' are not (fingerprint {saved['fingerprint']} there, "
        f"{now['fingerprint']} here)"
    )


def settings_difference(saved: Mapping[str, Any], settings: PolicySettings) -> str:
    """Return what of a base that was noted other settings say, before anything is loaded; places may differ."""
    return _named(saved, _kind(settings))


def _named(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    differing = [key for key in _NAMED if key in saved and key in now and saved[key] != now[key]]
    return "; ".join(f"{_NAMED[key]} {_shown(saved[key])} there, {_shown(now[key])} here" for key in differing)


def _shown(value: Any) -> str:
    text = str(value)
    return f"'{text[:16]}...'" if len(text) == 64 else f"'{text}'"
