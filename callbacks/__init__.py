"""Lightning callbacks: each needs torch, lightning and the torch-only null-space core."""

from nspo_lightning.callbacks.null_space_projection import NullSpaceProjection

__all__ = ["NullSpaceProjection"]
