"""The LoRA adapter: make one, load a saved one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from nspo_lightning.compat.peft import is_lora_parameter
from nspo_lightning.nullspace.modes import adapted_models
from nspo_lightning.policy.reach import beyond_text, inside
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.tied import untie_adapted_

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def add_adapter(base: PreTrainedModel, settings: PolicySettings) -> nn.Module:
    """Return the policy: the frozen base with a fresh float32 LoRA adapter, or all weights trainable if `lora` is null.

    An earlier adapter is merged if the settings say so; else its weights are put in place when training starts, see
    `warm_start`, since a run that is resumed has its own.

    Raises:
        PolicyError: If the adapter's settings don't fit the model, or `adapter` is given and can't be merged.
    """
    from peft import get_peft_model

    if settings.merged is not None:
        _check_merge(settings)
        base = merge_adapter(base, settings.merged)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if settings.lora is None:
        if settings.quantization != "none":
            raise PolicyError(
                "`policy.lora: null` trains all weights, which 4-bit ones can't be. "
                "Set `policy.quantization: none`, or give `policy.lora`."
            )
        base.requires_grad_(True)
        for name in _left_out(base):
            base.get_submodule(name).requires_grad_(False)
        return cast(nn.Module, base)
    left_out = _left_out(base)
    changes = {"exclude_modules": inside(left_out)} if left_out else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You have passed exclude_modules")  # no target was among them
            policy: nn.Module = get_peft_model(base, lora_config(settings.lora, **changes))
    except ValueError as error:
        raise PolicyError(f"`policy.lora` does not fit the model: {error}") from error
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def _left_out(base: PreTrainedModel) -> list[str]:
    """Return what text never reaches, and say that it is not trained."""
    names = beyond_text(base)
    if names:
        warnings.warn(
            f"No text reaches {', '.join(names)} of {type(base).__name__}: nothing is trained there.", stacklevel=3
        )
    return names


def _check_merge(settings: PolicySettings) -> None:
    if not Path(str(settings.merged)).is_dir():
        raise PolicyError(f"`policy.adapter`: expected a PEFT adapter's folder, found nothing at '{settings.merged}'.")
    if settings.quantization != "none":
        raise PolicyError(
            "`policy.merge_adapter` with a 4-bit base would round the adapter away. Merge into the full-precision "
            "base (`policy.quantization: none`), save that model, and load it in 4-bit."
        )


def merge_adapter(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Add a saved adapter to an unquantised base, and freeze the sum."""
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(base, folder)
    untie_adapted_(adapted.get_base_model())  # else the head's update would move the embedding too
    merged: PreTrainedModel = adapted.merge_and_unload()
    merged.requires_grad_(False)
    return merged


def lora_config(lora: LoraSettings, **changes: Any) -> LoraConfig:
    """Return PEFT's configuration of an adapter, with further or other values of its fields."""
    from peft import LoraConfig

    values: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "use_rslora": lora.use_rslora,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**values | changes)


def has_adapter(policy: nn.Module) -> bool:
    """Tell whether there is an adapter to switch off (`nullspace.modes.adapters_off`)."""
    return bool(adapted_models(policy))


def load_adapter_(policy: nn.Module, folder: Path, *, named: str = "", cure: str = "") -> None:
    """Put a saved adapter's weights on a policy with an adapter of the same form.

    Args:
        policy: The policy.
        folder: The adapter's.
        named: The setting that names it, for messages; default: `--ckpt_path`.
        cure: What to do if its form is another; default: take the settings that it was trained with.

    Raises:
        PolicyError: If they don't fit.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    named, cure = named or f"`--ckpt_path {folder}`", cure or "Use the settings that it was trained with."
    if not has_adapter(policy):
        raise PolicyError(
            f"{named} is an adapter, and the policy has none (`policy.lora: null`). Use the config of the run that "
            "trained it."
        )
    model: Any = policy
    saved = PeftConfig.from_pretrained(str(folder)).to_dict()
    mine = model.peft_config[model.active_adapter].to_dict()
    for key in ("r", "lora_alpha", "use_rslora"):
        if saved.get(key) != mine[key]:
            raise PolicyError(f"{named} has {key} {saved.get(key)}, and `policy.lora` makes {mine[key]}. {cure}")
    result: Any = set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
    missing = [name for name in result.missing_keys if is_lora_parameter(name)]
    if missing or result.unexpected_keys:
        odd = (missing + list(result.unexpected_keys))[0]
        raise PolicyError(
            f"{named} does not fit the policy: '{odd}' stands on one side only (`policy.lora.target_modules`). {cure}"
        )
