"""The base of a shape, made on the device: random weights, quantised matrix by matrix, as `load_base` would hand it on.

At no time is more than one matrix there in 16 bit before it is 4-bit, so a card that holds the model can make it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workload import TOKENIZER

from nspo_lightning.compat.bitsandbytes import hide_missing_kernel, keep_4bit_exact
from nspo_lightning.policy import loading
from nspo_lightning.policy.settings import PolicySettings

Fill = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
"""Name, shape, dtype, device -> the values of a parameter."""


def random_values(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw as models are initialised: matrices from N(0, 0.02), norms one, biases zero."""
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device).mul_(0.02)


def make_base(settings: PolicySettings, device: torch.device, fill: Fill = random_values) -> Any:
    """Make what `load_base(settings, device)` loads, from the configuration alone: 4-bit, frozen, in eval mode."""
    hide_missing_kernel()
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    dtype = loading.TORCH_DTYPES[settings.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantization,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
    config = AutoConfig.from_pretrained(settings.model_path)
    with init_empty_weights(include_buffers=False):  # buffers (of the rotation) get their values
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=settings.attn_implementation)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        with torch.device("meta"):
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                compress_statistics=settings.double_quantization,
                quant_type=settings.quantization,
            )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
        values = fill(f"{name}.weight", (module.out_features, module.in_features), dtype, device)
        layer.weight = Params4bit(
            values,
            requires_grad=False,
            quant_type=settings.quantization,
            compress_statistics=settings.double_quantization,
            module=layer,
        ).to(device)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        del values
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            parent, _, attribute = name.rpartition(".")
            made = fill(name, tuple(parameter.shape), dtype, device)
            setattr(model.get_submodule(parent), attribute, nn.Parameter(made, requires_grad=False))
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    # What transformers notes on a model that it has quantised itself; PEFT and TRL ask for it.
    model.config.quantization_config = quantization
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = quantization.quant_method
    model.requires_grad_(False)
    keep_4bit_exact(model)
    return model.eval()


@contextmanager
def made_bases() -> Iterator[None]:
    """Have `load_policy` make its base instead of reading weights that nobody has, inside the block."""
    original = loading.load_base
    loading.load_base = make_base
    try:
        yield
    finally:
        loading.load_base = original


def policy_settings(folder: Path, rank: int, *, checkpointing: bool, **more: Any) -> PolicySettings:
    """Return the policy that everything here measures: NF4 with double quantisation in bf16, LoRA on all layers."""
    from nspo_lightning.policy.settings import LoraSettings

    return PolicySettings(
        path=str(folder),
        tokenizer=str(folder / TOKENIZER),
        quantization="nf4",
        double_quantization=True,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        lora=LoraSettings(r=rank, alpha=2.0 * rank),
        **more,
    )
