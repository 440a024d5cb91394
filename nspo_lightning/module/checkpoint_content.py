"""What a checkpoint of ours holds beside Lightning's part, and whether it belongs to a policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from nspo_lightning.checkpoints import ADAPTER_CONFIG, PREFIX, STATE_KEY, read_checkpoint
from nspo_lightning.module.resumed_settings import adapter_settings, changed_in_words
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.base_record import RECORD, base_difference
from nspo_lightning.policy.settings import PolicyError


def keep_trained_(checkpoint: dict[str, Any], policy: TextPolicy) -> None:
    """Leave only trained parameters in a checkpoint, and note which base they belong to."""
    names = {PREFIX + name for name in policy.trained_names()}
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in names}
    checkpoint[STATE_KEY] = {
        "policy": policy.fingerprint,
        "policy_path": policy.settings.path,
        "places": policy.settings.places(),  # a relative path means nothing elsewhere
        "base": policy.base_record(),
        "adapter": adapter_settings(policy.settings.lora),
    }


def check_checkpoint(checkpoint: Mapping[str, Any], policy: TextPolicy) -> None:
    """Refuse a checkpoint of another project, or of another base or adapter than this loaded policy's."""
    state = checkpoint.get(STATE_KEY)
    if state is None:
        raise PolicyError("The checkpoint was not written by this project. Give one from a run's `checkpoints/`.")
    earlier = {"fingerprint": state["policy"], "path": state["policy_path"]}
    if difference := base_difference(state.get("base", earlier), policy.base_record()):
        raise PolicyError(
            f"The checkpoint belongs to another model than `policy.path` '{policy.settings.path}': {difference}. Give "
            "the checkpoint's own base, with the same quantization and dtype."
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
    if changed := changed_in_words(state.get("adapter", {}), adapter_settings(policy.settings.lora)):
        raise PolicyError(
            f"The checkpoint's adapter is scaled in another way than this one: {changed}. Its weights would mean "
            "another policy. Set what it was trained with (the first of each two)."
        )


def load_trained_(module: pl.LightningModule, path: Path) -> None:
    """Put what a checkpoint has trained into a loaded module, outside of a Trainer's jobs.

    Raises:
        CheckpointError: If it can't be read.
        PolicyError: If it belongs to another project, base or adapter.
    """
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)  # the base is not in it


def check_adapter_base(folder: Path, policy: TextPolicy) -> None:
    """Refuse an adapter that was trained on another base than this loaded policy's; warn of one that doesn't say."""
    record, now = folder / RECORD, policy.base_record()
    if record.is_file():
        if difference := base_difference(json.loads(record.read_text(encoding="utf-8")), now):
            raise PolicyError(
                f"The adapter in {folder} was trained on another base than the configuration's: {difference}. Its "
                "figures there would mean nothing: use the config.yaml of the run that trained it."
            )
        return
    named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    rank_zero_warn(
        f"The adapter in {folder} does not say in which precision its base was (no {RECORD}); it names '{named}'. It "
        f"is used on '{now['path']}' with `policy.quantization: {now['quantization']}`."
    )
