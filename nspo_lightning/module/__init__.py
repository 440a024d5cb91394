"""GRPO as a LightningModule."""

from nspo_lightning.module.grpo_module import GRPOModule

__all__ = ["GRPOModule"]
