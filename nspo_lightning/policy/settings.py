"""What a policy is and how it is loaded, as settings: plain data, no model library."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nspo_lightning.nullspace.layers import check_targets

TOY = "toy"
TOY_PATH = Path(__file__).parents[1] / "toy" / "base"


class PolicyError(ValueError):
    """A policy that can't be loaded or trained as asked."""


@dataclass(kw_only=True)
class LoraSettings:
    """The adapter that gets trained.

    Attributes:
        r: Rank.
        alpha: Scaling numerator; the update is ``alpha / r * B A`` (``alpha / sqrt(r)`` with `use_rslora`).
        dropout: Dropout before A in training; it loosens the null-space promise in train mode, so 0 by default.
        target_modules: Names of linear layers, or "all-linear" (all but the output head). What text never reaches, such
            as a vision tower, gets no adapter.
        use_rslora: Scale by ``alpha / sqrt(r)``.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises PolicyError."""
        if self.r < 1:
            raise PolicyError(f"`policy.lora.r` must be a rank of at least 1, got {self.r}. 16 is a good start.")
        if not (0 < self.alpha < float("inf")):
            raise PolicyError(f"`policy.lora.alpha` must be positive, got {self.alpha}. Twice `r` is usual.")
        if not 0 <= self.dropout < 1:
            raise PolicyError(f"`policy.lora.dropout` must be in [0, 1), got {self.dropout}. 0 is the default.")
        check_targets(self.target_modules, "policy.lora.target_modules")


@dataclass(kw_only=True)
class PolicySettings:
    """The policy and how it is loaded.

    Attributes:
        path: Folder or hub id of a causal language model, or a GGUF file, which is unpacked once into a cache
            (docs/recipes.md); "toy" is the embedded one.
        gguf_file: Name of a GGUF file in that folder or hub repository. Not needed where it holds one and no other
            weights.
        revision: Revision on the hub.
        quantization: "nf4" or "fp4" (bitsandbytes, 4-bit base), or "none".
        double_quantization: Quantise the quantisation constants too.
        dtype: Dtype of the base (and of 4-bit computation).
        lora: The adapter; null trains all weights.
        adapter: Folder of an adapter to go on from, trained on this base: one that `warmup` or `fit` wrote in the very
            null space of this run goes on as it is; any other is merged into an unquantised base (`merge_adapter`).
        merge_adapter: Merge `adapter` into the base before a new adapter is added.
        tokenizer: Folder or hub id of the tokenizer, if not that of the policy.
        chat_template: Jinja template, or a file that holds one; the tokenizer's own if null. It serves all uses
            (prompts, calibration, evaluation) and is saved with the adapter.
        chat_template_kwargs: Variables that the chat template reads, for all uses too: `{enable_thinking: false}`
            makes Qwen3 answer without a thought. They become the saved template's defaults.
        attn_implementation: Passed to transformers; null = its own choice. A model without "sdpa" gets "eager".
        gradient_checkpointing: Recompute activations in the backward pass.
        training_weights: What 4-bit layers compute with, in training and whatever else runs the policy in this process.
            "quantized": each product unpacks its weights. "dequantized": a copy in full, made once; the same numbers,
            faster, 2 to 4 bytes a parameter. "auto": the copy on a CPU with four times its bytes free, none on a GPU.
        sampling_weights: What completions are drawn with in this process. "quantized": the weights as they are trained.
            "dequantized": the 4-bit values unpacked once a rollout, the same function with fewer products.
            "merged": those plus the adapter's update, rounded, in training alone, which corrects the rounding;
            "dequantized" elsewhere. Both need memory while completions are drawn. "auto": "merged" where a GPU has
            room, else "quantized". See docs/performance.md.
        trust_remote_code: Run code that comes with the checkpoint. Off unless you have read it.
    """

    path: str = TOY
    gguf_file: str | None = None
    revision: str | None = None
    quantization: Literal["none", "nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    adapter: str | None = None
    merge_adapter: bool = False
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    attn_implementation: str | None = "sdpa"
    gradient_checkpointing: bool = False
    training_weights: Literal["auto", "quantized", "dequantized"] = "auto"
    sampling_weights: Literal["auto", "quantized", "dequantized", "merged"] = "auto"
    trust_remote_code: bool = False

    @property
    def merged(self) -> str | None:
        """Return the adapter that is merged into the base; None = the base as it is."""
        return self.adapter if self.merge_adapter else None

    @property
    def warm_start(self) -> str | None:
        """Return the adapter that training goes on from; None = a fresh one."""
        return None if self.merge_adapter else self.adapter

    @property
    def model_path(self) -> str:
        """Return the folder, as an absolute path, or the hub id; "toy" is a folder of this package."""
        return str(TOY_PATH) if self.path == TOY else self.places().get("path", self.path)

    def places(self) -> dict[str, str]:
        """Return the absolute path of what is a file or folder here, by the setting that names it."""
        names = ("path", "tokenizer", "adapter", "chat_template")
        given = {name: os.path.expanduser(vars(self)[name] or "") for name in names if vars(self)[name] != TOY}
        return {name: os.path.abspath(path) for name, path in given.items() if os.path.exists(path)}
