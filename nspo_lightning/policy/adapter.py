"""The LoRA adapter: make one, switch it off, load a saved one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from nspo_lightning.checkpoints import ADAPTER_CONFIG
from nspo_lightning.policy.settings import PolicyError, PolicySettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapter(base: PreTrainedModel, settings: PolicySettings) -> nn.Module:
    """Put a fresh float32 LoRA adapter on the base (or prepare it for full fine-tuning).

    Args:
        base: The frozen base.
        settings: Says which adapter.

    Returns:
        The policy: a `peft.PeftModel`, or the base itself with all weights trainable if `lora` is null.

    Raises:
        PolicyError: If the adapter's settings don't fit the model, or `adapter` is given and can't be merged.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if settings.adapter is not None:
        if not Path(settings.adapter).is_dir():
            raise PolicyError(
                f"`policy.adapter`: expected a PEFT adapter's folder, found nothing at '{settings.adapter}'."
            )
        if not settings.merge_adapter:
            raise PolicyError(
                f"`policy.adapter` '{settings.adapter}' has been trained: its B is not zero, so projecting its A would "
                "change what it does, and no update of it could be kept in the null space. Set `policy.merge_adapter: "
                "true` with `policy.quantization: none` to merge it into the base first; a new adapter goes on from it."
            )
        if settings.quantization != "none":
            raise PolicyError(
                "`policy.merge_adapter` with a 4-bit base would round the adapter away. Merge into the full-precision "
                "base (`policy.quantization: none`), save that model, and load it in 4-bit."
            )
        base = PeftModel.from_pretrained(base, settings.adapter).merge_and_unload()
        base.requires_grad_(False)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if settings.lora is None:
        if settings.quantization != "none":
            raise PolicyError(
                "`policy.lora: null` trains all weights, which 4-bit ones can't be. "
                "Set `policy.quantization: none`, or give `policy.lora`."
            )
        return cast(nn.Module, base.requires_grad_(True))
    lora = settings.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    try:
        policy: nn.Module = get_peft_model(base, config)
    except ValueError as error:
        raise PolicyError(f"`policy.lora` does not fit the model: {error}") from error
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def has_adapter(policy: nn.Module) -> bool:
    """Tell whether there is an adapter to switch off.

    Args:
        policy: A PEFT model or a plain one.

    Returns:
        True for a PEFT model.
    """
    return callable(getattr(policy, "disable_adapter", None))


@contextmanager
def without_adapter(policy: nn.Module) -> Iterator[None]:
    """Run the base: the policy with its adapter off. No parameter changes, nor what requires a gradient.

    Args:
        policy: A PEFT model.

    Yields:
        Nothing.

    Raises:
        TypeError: If the policy has no adapter.
    """
    disable: Any = getattr(policy, "disable_adapter", None)
    if not callable(disable):
        raise TypeError(
            f"{type(policy).__name__} has no adapter to switch off, so there is no base to compare with. Train with "
            "`policy.lora`."
        )
    with disable():
        yield


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
