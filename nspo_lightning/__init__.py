"""Safety reinforcement learning without the alignment tax (NSPO, arXiv 2512.11391), for PyTorch Lightning.

The public names are loaded when they are first used, so that importing one part does not import the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nspo_lightning.callbacks import NullSpaceProjection as NullSpaceProjection
    from nspo_lightning.datamodules import AlignmentDataModule as AlignmentDataModule
    from nspo_lightning.module.grpo_module import GRPOModule as GRPOModule
    from nspo_lightning.policy.settings import LoraSettings as LoraSettings
    from nspo_lightning.policy.settings import PolicySettings as PolicySettings

__version__ = "0.1.0"

_EXPORTS = {
    "AlignmentDataModule": "nspo_lightning.datamodules",
    "GRPOModule": "nspo_lightning.module",
    "LoraSettings": "nspo_lightning.policy",
    "NullSpaceProjection": "nspo_lightning.callbacks",
    "PolicySettings": "nspo_lightning.policy",
}
__all__ = ["AlignmentDataModule", "GRPOModule", "LoraSettings", "NullSpaceProjection", "PolicySettings"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
