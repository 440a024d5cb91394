"""Going on from an adapter that was trained before: in the very same null space, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nspo_lightning.callbacks.protocols import StartsWarm
from nspo_lightning.nullspace.fingerprint import differences
from nspo_lightning.policy.warm_start import CURES, WarmStart

_HASHES = {
    "data": "the calibration text (`data.general`, `data.calibration_*`, the chat template)",
    "model.weights": "the base's weights (another model, quantisation or dtype)",
    "model.buffers": "the base's buffers",
    "model.configuration": "the base's configuration",
    "model.structure": "which layers are held (`policy.lora.target_modules`, `nullspace.target_modules`)",
}
"""What can only be told by a hash, in words."""


def warm_start_of(pl_module: pl.LightningModule) -> WarmStart | None:
    """Return what a module's adapter says of itself; None for a fresh one."""
    return pl_module.warm_start if isinstance(pl_module, StartsWarm) else None


def check_same_null_space(warm: WarmStart, fingerprint: Mapping[str, Any]) -> None:
    """Refuse an adapter that was trained in another null space than this run's.

    Args:
        warm: What the adapter says of itself.
        fingerprint: Of this run's basis, or of the one that is to be made.

    Raises:
        MisconfigurationException: Saying what differs.
    """
    if warm.basis is None:
        found = ["it was trained in no null space (`nullspace.enabled: false`)"]
    else:
        found = [_in_words(said) for said in differences(warm.basis, fingerprint)]
    if found:
        raise MisconfigurationException(
            "`policy.adapter` was trained in another null space than this run's, so its update would leak into what "
            "this run protects:\n  " + "\n  ".join(found) + f"\n{CURES}"
        )


def _in_words(said: str) -> str:
    name = said.partition(":")[0]
    if name in _HASHES:
        return f"{_HASHES[name]} differ from the adapter's"
    if name.startswith("settings."):
        return "nullspace." + said.removeprefix("settings.").replace("the file has", "the adapter's was")
    return said.replace("the file has", "the adapter's was")
