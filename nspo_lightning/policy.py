"""Load what gets trained: tokenizer, base model (4-bit or not) and its LoRA adapter.

The only module that touches peft and bitsandbytes. Everything a user can get wrong about a policy is found here, before
any long work, as a `PolicyError` that says what was expected, what was found and how to mend it.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOY = "toy"
TOY_PATH = Path(__file__).parent / "toy" / "base"
CPU_4BIT_OUT_MULTIPLE = 32
"""Out-features of bitsandbytes' 4-bit layers on CPU must be a multiple of this."""


class PolicyError(ValueError):
    """A policy that can't be loaded or trained as asked."""


@dataclass(kw_only=True)
class LoraSettings:
    """The adapter that gets trained.

    Attributes:
        r: Rank.
        alpha: Scaling numerator; the update is ``alpha / r * B A`` (``alpha / sqrt(r)`` with `use_rslora`).
        dropout: Dropout before A in training; it loosens the null-space promise in train mode, so 0 by default.
        target_modules: Names of linear layers, or "all-linear" (all but the output head).
        use_rslora: Scale by ``alpha / sqrt(r)``.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PolicyError: If one is out of its range.
        """
        if self.r < 1:
            raise PolicyError(f"`policy.lora.r` must be a rank of at least 1, got {self.r}. 16 is a good start.")
        if not (0 < self.alpha < float("inf")):
            raise PolicyError(f"`policy.lora.alpha` must be positive, got {self.alpha}. Twice `r` is usual.")
        if not 0 <= self.dropout < 1:
            raise PolicyError(f"`policy.lora.dropout` must be in [0, 1), got {self.dropout}. 0 is the default.")


@dataclass(kw_only=True)
class PolicySettings:
    """The policy and how it is loaded.

    Attributes:
        path: Folder or hub id of a causal language model; "toy" is the embedded one.
        revision: Revision on the hub.
        quantization: "nf4" or "fp4" (bitsandbytes, 4-bit base), or "none".
        double_quantization: Quantise the quantisation constants too.
        dtype: Dtype of the base (and of 4-bit computation).
        lora: The adapter; null trains all weights.
        adapter: Folder of an adapter to go on from, trained on this base. Its B is not zero, so it is merged into
            an unquantised base first (`merge_adapter`), else refused.
        merge_adapter: Merge `adapter` into the base before a new adapter is added.
        tokenizer: Folder or hub id of the tokenizer, if not that of the policy.
        chat_template: Jinja template, or a file that holds one, for a tokenizer without its own.
        attn_implementation: Passed to transformers.
        gradient_checkpointing: Recompute activations in the backward pass.
        trust_remote_code: Run code that comes with the checkpoint. Off unless you have read it.
    """

    path: str = TOY
    revision: str | None = None
    quantization: Literal["none", "nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    adapter: str | None = None
    merge_adapter: bool = False
    tokenizer: str | None = None
    chat_template: str | None = None
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    @property
    def model_path(self) -> str:
        """Return the folder or hub id, with "toy" resolved."""
        return str(TOY_PATH) if self.path == TOY else self.path


def _from_pretrained(loader: Any, what: str, settings: PolicySettings, path: str, **kwargs: Any) -> Any:
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
    except (OSError, ValueError, KeyError) as error:
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


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer, left-padding, with a pad token and a chat template.

    Args:
        settings: What to load.

    Returns:
        The tokenizer.

    Raises:
        PolicyError: If there is none, or it has no chat template and none is given.
    """
    from transformers import AutoTokenizer

    path = settings.tokenizer or settings.model_path
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", settings, path)
    if settings.chat_template is not None:
        file = Path(settings.chat_template)
        is_file = len(settings.chat_template) < 1024 and file.is_file()
        if not is_file and "{" not in settings.chat_template:
            raise PolicyError(
                f"`policy.chat_template` is neither a Jinja template nor a file that is there: "
                f"{settings.chat_template[:80]!r}. Give the template's text or the path of a .jinja file."
            )
        tokenizer.chat_template = file.read_text() if is_file else settings.chat_template
    if not tokenizer.chat_template:
        raise PolicyError(
            f"The tokenizer of '{path}' has no chat template, so prompts can't be rendered. "
            "Give one as `policy.chat_template` (a Jinja template, or a file that holds one)."
        )
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise PolicyError(f"The tokenizer of '{path}' has no EOS token, so no completion could ever end. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def check_4bit_widths(settings: PolicySettings, device_type: str) -> None:
    """Refuse 4-bit for widths that the backend can't take, before anything is loaded.

    Args:
        settings: What is to be loaded.
        device_type: "cpu" or "cuda": bitsandbytes' CPU kernels want out-features in multiples of 32.

    Raises:
        PolicyError: Naming the first layer that doesn't fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if settings.quantization == "none" or device_type != "cpu":
        return
    config = _from_pretrained(AutoConfig, "model configuration", settings, settings.model_path)
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
    """Load the base model, quantised if asked.

    Args:
        settings: What to load.
        device: Where it will live; 4-bit weights are made there.

    Returns:
        The model, all parameters frozen, in eval mode.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    # It reports, as an error, that an optional kernel is missing which `keep_4bit_exact` would not let it use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
    if settings.path == TOY:  # too small for a bar
        disable_progress_bar()
    dtype = getattr(torch, settings.dtype)
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attn_implementation}
    if settings.quantization != "none":
        check_4bit_widths(settings, device.type)
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
        kwargs["device_map"] = {"": device}
    model = _from_pretrained(AutoModelForCausalLM, "causal language model", settings, settings.model_path, **kwargs)
    model.requires_grad_(False)
    keep_4bit_exact(model)
    return model  # type: ignore[no-any-return]


def keep_4bit_exact(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on one arithmetic in training and sampling.

    On CPUs with AVX512-BF16 a 4-bit layer repacks itself at its first call in eval mode: from then on it computes in
    bfloat16, with rounded quantisation constants, and hands no gradient to its input, in train mode too. A policy that
    samples between two updates would silently lose its gradients.

    Args:
        model: A model with `bitsandbytes.nn.Linear4bit` layers, or without; changed in place.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


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


def load_policy(settings: PolicySettings, device: torch.device) -> nn.Module:
    """Load base and adapter.

    Args:
        settings: What to load.
        device: Where it will live.

    Returns:
        The policy, ready to train.
    """
    return add_adapter(load_base(settings, device), settings).train()


def stop_token_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Collect every token that ends a completion: the generation settings' EOS ids and the tokenizer's.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.

    Returns:
        Sorted token ids.
    """
    found: set[int] = {int(tokenizer.eos_token_id)}
    for config in (getattr(policy, "generation_config", None), getattr(policy, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return sorted(found)


def policy_fingerprint(policy: nn.Module) -> str:
    """Name the frozen base: a hash of its parameters' names and shapes and of the values of its small ones.

    Args:
        policy: The policy; adapters don't count.

    Returns:
        16 hex digits, the same in every process that loads the same base.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if "lora_" in name:
            continue
        digest.update(
            f"{name.replace('base_model.model.', '').replace('base_layer.', '')}{tuple(parameter.shape)}".encode()
        )
        values: Tensor = parameter.detach().reshape(-1)[:256].cpu()
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
