"""Find what a run has trained, a checkpoint or an adapter's folder, and put it on a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nspo_lightning.checkpoints import read_checkpoint
from nspo_lightning.policy import PolicyError

if TYPE_CHECKING:
    from nspo_lightning.policy_module import PolicyModule

ADAPTER_CONFIG = "adapter_config.json"
LAST = "last.ckpt"


def find_trained(name: str, run: Path) -> Path:
    """Resolve what `--ckpt_path` says.

    Args:
        name: ``best`` (what the run's `ModelCheckpoint` with a monitor calls so), ``last``, a checkpoint file, or a
            folder with a PEFT adapter.
        run: The run's folder, for the first two.

    Returns:
        The file or folder.

    Raises:
        PolicyError: If there is none.
    """
    if name not in {"best", "last"}:
        path = Path(name).expanduser()
        if path.is_file() or (path / ADAPTER_CONFIG).is_file():
            return path
        what = f"a folder without {ADAPTER_CONFIG}" if path.is_dir() else "nothing"
        raise PolicyError(
            f"`--ckpt_path {name}`: expected a checkpoint file, or a folder with a PEFT adapter, and found {what} "
            "there. Give a file from a run's `checkpoints/`, its `adapter/`, or `best` or `last`."
        )
    folder = run / "checkpoints"
    last = folder / LAST
    if not last.is_file():
        raise PolicyError(
            f"`--ckpt_path {name}`: expected the run's {last}, and it is not there. Give the name of a run that was "
            "trained (`--name`), or a checkpoint file."
        )
    if name == "last":
        return last
    states = read_checkpoint(last).get("callbacks", {})
    for state in states.values():
        path = Path(str(state.get("best_model_path") or "")) if isinstance(state, dict) else Path()
        if not isinstance(state, dict) or not state.get("monitor"):
            continue
        for candidate in (folder / path.name, path):  # the run's folder may have been moved
            if candidate.is_file():
                return candidate
    raise PolicyError(
        f"`--ckpt_path best`: no `ModelCheckpoint` of {run} monitored a metric and kept a file, so none is the best. "
        "Use `last`, or train with `monitor`."
    )


def load_adapter_(policy: nn.Module, folder: Path) -> None:
    """Put a saved PEFT adapter's weights on a policy that has an adapter of the same form.

    Args:
        policy: A PEFT model; changed in place.
        folder: What `save_adapter` wrote.

    Raises:
        PolicyError: If the two don't fit together.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    model: Any = policy
    if not callable(getattr(policy, "disable_adapter", None)):
        raise PolicyError(
            f"`--ckpt_path {folder}` is an adapter, and the policy has none (`policy.lora: null`). Use the config of "
            "the run that trained it."
        )
    saved = json.loads((folder / ADAPTER_CONFIG).read_text())
    mine = model.peft_config[model.active_adapter]
    for key in ("r", "lora_alpha", "use_rslora"):
        if saved.get(key) != getattr(mine, key):
            raise PolicyError(
                f"The adapter in {folder} has {key} {saved.get(key)}, and `policy.lora` makes {getattr(mine, key)}. "
                "Use the `policy.lora` settings that it was trained with."
            )
    weights = load_peft_weights(str(folder), device="cpu")
    result = set_peft_model_state_dict(policy, weights)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        odd = (missing + list(result.unexpected_keys))[0]
        raise PolicyError(
            f"The adapter in {folder} does not fit the policy: '{odd}' stands on one side only. Use the "
            "`policy.lora.target_modules` that it was trained with."
        )


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
