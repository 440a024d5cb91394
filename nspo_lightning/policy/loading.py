"""Load the base model, 4-bit or not, and put its adapter on it.

What a user can get wrong about a policy is found before any long work, as a `PolicyError` that says what was expected,
what was found and how to mend it.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from nspo_lightning.compat.bitsandbytes import hide_missing_kernel, keep_4bit_exact
from nspo_lightning.compat.host import multiplies_fast
from nspo_lightning.policy.adapter import add_adapter
from nspo_lightning.policy.gguf import model_folder
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.warm_start import read_warm_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_4BIT_OUT_MULTIPLE = 32
"""Out-features of bitsandbytes' 4-bit layers on CPU must be a multiple of this."""
OLDEST_FOR_4BIT, OLDEST_FOR_BFLOAT16 = (6, 0), (8, 0)
"""Compute capabilities: what bitsandbytes is built for, and what has bfloat16 in hardware."""
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def from_pretrained(loader: Any, what: str, settings: PolicySettings, path: str, **kwargs: Any) -> Any:
    """Call a transformers class's `from_pretrained`; `what` it loads is said in the `PolicyError` if it can't."""
    # A GGUF file is loaded as the folder that it is converted into.
    path = model_folder(path, settings.gguf_file if path == settings.model_path else None, settings.revision)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise PolicyError(f"`policy.path`: expected a folder with a {what}, found nothing at '{path}'. Mend the path.")
    try:
        return loader.from_pretrained(
            str(Path(path).expanduser()) if looks_local else path,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise PolicyError(
                f"`policy.path`: the {what} at '{path}' comes with code of its own, which runs only if you say so. "
                "Read it, then set `policy.trust_remote_code: true`."
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PolicyError(
            f"`policy.path`: could not load the {what} from '{path}': {first} "
            "Give a folder that holds one, or a hub id that this machine can reach."
        ) from error
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        found = "they are a pickle that holds code, which is never run" if "Weights only" in str(error) else str(error)
        raise PolicyError(
            f"`policy.path`: the weights of the {what} in '{path}' can't be read: {found}. Fetch them again, as "
            "safetensors."
        ) from error


def loadable_folder(settings: PolicySettings) -> str:
    """Return what transformers and PEFT load the base from: its folder or hub id, of a GGUF the converted folder."""
    return model_folder(settings.model_path, settings.gguf_file, settings.revision)


def check_device(settings: PolicySettings, device: torch.device) -> None:
    """Refuse what a CUDA card is too old for, before anything is loaded; AMD's cards are not looked at.

    Raises:
        PolicyError: Naming the card and the setting that it can do.
    """
    if device.type != "cuda" or torch.version.hip:
        return
    found = torch.cuda.get_device_capability(device)
    card = f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}"
    if settings.quantization != "none" and found < OLDEST_FOR_4BIT:
        raise PolicyError(
            f"`policy.quantization` is '{settings.quantization}', and {card}: bitsandbytes needs "
            f"{OLDEST_FOR_4BIT[0]}.{OLDEST_FOR_4BIT[1]} or newer for it. Set `policy.quantization: none`, or use a "
            "newer card."
        )
    if settings.dtype == "bfloat16" and found < OLDEST_FOR_BFLOAT16:
        raise PolicyError(
            f"`policy.dtype` is bfloat16, and {card}: bfloat16 needs {OLDEST_FOR_BFLOAT16[0]}.{OLDEST_FOR_BFLOAT16[1]} "
            "or newer; older cards imitate it, many times slower. Set `policy.dtype: float16` with "
            "`trainer.precision: 16-mixed`, or float32."
        )


def check_4bit_widths(settings: PolicySettings, device_type: str) -> None:
    """Refuse 4-bit for widths that the backend ("cpu" or "cuda") can't take, before anything is loaded.

    Raises:
        PolicyError: Naming the first layer that doesn't fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if settings.quantization == "none" or device_type != "cpu":
        return
    config = from_pretrained(AutoConfig, "model configuration", settings, settings.model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.out_features % CPU_4BIT_OUT_MULTIPLE:
            raise PolicyError(
                f"`policy.quantization` is '{settings.quantization}', but layer '{name}' has {module.out_features} "
                f"out-features, and bitsandbytes on CPU takes multiples of {CPU_4BIT_OUT_MULTIPLE} only. "
                "Set `policy.quantization: none`, or train on a GPU."
            )


def load_base(settings: PolicySettings, device: torch.device) -> PreTrainedModel:
    """Load the base model onto a device, quantised if asked: all parameters frozen, in eval mode."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    check_device(settings, device)
    hide_missing_kernel()
    if os.path.exists(settings.model_path):  # `GRPOModule.load` shows a bar of ours; downloads have theirs
        disable_progress_bar()
    dtype = TORCH_DTYPES[settings.dtype]
    kwargs: dict[str, Any] = {"dtype": dtype}
    if settings.quantization != "none":
        check_4bit_widths(settings, device.type)
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
        kwargs["device_map"] = {"": device}
    model = _with_attention(AutoModelForCausalLM, settings, kwargs)
    model.requires_grad_(False)
    keep_4bit_exact(model)
    return model  # type: ignore[no-any-return]


def _with_attention(loader: Any, settings: PolicySettings, kwargs: dict[str, Any]) -> Any:
    """Load a model with the attention that was asked for; an architecture without SDPA gets eager attention."""

    def load(attention: str | None) -> Any:
        given = {**kwargs, "attn_implementation": attention}
        return from_pretrained(loader, "causal language model", settings, settings.model_path, **given)

    asked = settings.attn_implementation
    try:
        return load(asked)
    except PolicyError as error:
        said = str(error.__cause__)
        if asked is None or not any(word in said for word in ("attention", "Attention", "attn_implementation")):
            raise
        if asked == "sdpa" and "scaled_dot_product_attention" in said:
            warnings.warn(
                f"transformers has no SDPA attention for '{settings.path}': eager attention is used, slower and the "
                "same function. `policy.attn_implementation: eager` asks for it.",
                stacklevel=2,
            )
            return load("eager")
        raise PolicyError(
            f"`policy.attn_implementation` is '{asked}', which '{settings.path}' can't have here: "
            f"{said.strip().splitlines()[0]} Set `sdpa`, `eager`, or null for what transformers chooses."
        ) from error


def load_policy(settings: PolicySettings, device: torch.device) -> nn.Module:
    """Return base and adapter, ready to train; warn of a dtype that is slow on this CPU.

    A warm start's weights are put in place by `load_warm_start_`.

    Raises:
        PolicyError: If something can't be loaded, or the warm start is an adapter that can't go on as it is.
    """
    if device.type == "cpu" and not multiplies_fast(TORCH_DTYPES[settings.dtype]):
        warnings.warn(
            f"`policy.dtype` is {settings.dtype}, and this CPU has no instructions for it: torch imitates them, ten "
            "times slower and more. `policy.dtype: float32` is fast here.",
            stacklevel=2,
        )
    if settings.warm_start is not None and Path(settings.warm_start).expanduser().is_dir():  # else a resume may be fine
        read_warm_start(Path(settings.warm_start).expanduser())
    return add_adapter(load_base(settings, device), settings).train()
