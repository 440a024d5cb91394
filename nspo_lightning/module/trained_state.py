"""Put what a run has trained, a checkpoint or an adapter's folder, on a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nspo_lightning.checkpoints import read_checkpoint
from nspo_lightning.policy.adapter import load_adapter_

if TYPE_CHECKING:
    from nspo_lightning.module.policy_module import PolicyModule


def load_trained_(module: PolicyModule, path: Path) -> None:
    """Load the policy and put a checkpoint or an adapter on it, outside of a Trainer.

    Args:
        module: Whose policy; changed in place.
        path: A checkpoint file or an adapter's folder.

    """
    if path.is_dir():
        module.configure_model()
        load_adapter_(module.require_policy(), path)
        module.adapter_folder = path
        return
    checkpoint = read_checkpoint(path)
    module.check_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
