"""What a checkpoint of ours holds beside Lightning's part, and whether it belongs to a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nspo_lightning.module.resumed_settings import adapter_settings, differing
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.identity import PREFIX, STATE_KEY
from nspo_lightning.policy.settings import PolicyError


def keep_trained_(checkpoint: dict[str, Any], policy: TextPolicy) -> None:
    """Leave only trained parameters in a checkpoint, and note which base they belong to."""
    names = {PREFIX + name for name in policy.trained_names()}
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in names}
    checkpoint[STATE_KEY] = {
        "policy": policy.fingerprint,
        "policy_path": policy.settings.path,
        "places": policy.settings.places(),  # a relative path means nothing elsewhere
        "adapter": adapter_settings(policy.settings.lora),
    }


def check_checkpoint(checkpoint: Mapping[str, Any], policy: TextPolicy) -> None:
    """Refuse a checkpoint of another project, or of another base or adapter than this loaded policy's."""
    state = checkpoint.get(STATE_KEY)
    if state is None:
        raise PolicyError("The checkpoint was not written by this project. Give one from a run's `checkpoints/`.")
    if state["policy"] != policy.fingerprint:
        raise PolicyError(
            f"The checkpoint belongs to another model: it was trained on '{state['policy_path']}' (fingerprint "
            f"{state['policy']}), and `policy.path` is '{policy.settings.path}' ({policy.fingerprint}). "
            "Give the checkpoint's own base, with the same quantization and dtype."
        )
    names = policy.trained_names()
    mine = {PREFIX + name: tuple(p.shape) for name, p in policy.require().named_parameters() if name in names}
    found = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if mine != found:
        odd = sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name))[0]
        raise PolicyError(
            f"The checkpoint's adapter does not fit this one: '{odd}' has shape {found.get(odd)} there and "
            f"{mine.get(odd)} here. Use the `policy.lora` settings that it was trained with (they stand in the "
            "config.yaml of its run)."
        )
    if changed := differing(state.get("adapter", {}), adapter_settings(policy.settings.lora)):
        raise PolicyError(
            f"The checkpoint's adapter is scaled in another way than this one: {changed}. Its weights would mean "
            "another policy. Set what it was trained with (the first of each two)."
        )
