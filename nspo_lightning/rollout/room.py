"""What a rollout takes in memory, and what to lower where a device has too little of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nspo_lightning.policy.parts import text_setting
from nspo_lightning.terminal import counted


class RolloutMemoryError(ValueError):
    """A rollout that does not fit into the device's memory."""


@dataclass(frozen=True, kw_only=True)
class RolloutSize:
    """Numbers that decide what a rollout takes.

    Attributes:
        prompts: P.
        group_size: G.
        prompt_tokens: L, of the longest prompt.
        new_tokens: C, the limit.
        shared: Whether prompts are kept once a group.
        bytes_per_token: Of one token's keys and values, all layers; None = not known.
        vocab_size: V.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    shared: bool
    bytes_per_token: int | None
    vocab_size: int

    @property
    def rows(self) -> int:
        """R = P * G."""
        return self.prompts * self.group_size

    @property
    def cache_bytes(self) -> int:
        """Keys and values when all completions are as long as they may be; 0 where a token's are not known."""
        prompts = self.prompts if self.shared else self.rows
        return (prompts * self.prompt_tokens + self.rows * self.new_tokens) * (self.bytes_per_token or 0)

    @property
    def logit_bytes(self) -> int:
        """One token's logits in float32, their softmax, and its sums in float64."""
        return self.rows * self.vocab_size * 16


def bytes_per_token(model: Any) -> int | None:
    """Return the bytes of one token's keys and values: 2 x layers x key-value heads x head size x bytes a number.

    None where the config does not say: a model without attention has none, others name them in a way of their own.
    """
    names = ("num_attention_heads", "hidden_size", "num_hidden_layers")
    heads, hidden, layers = (text_setting(model, name) for name in names)
    if not all(isinstance(number, int) and number > 0 for number in (heads, hidden, layers)):
        return None
    kv_heads = text_setting(model, "num_key_value_heads") or text_setting(model, "num_kv_heads") or heads
    if text_setting(model, "multi_query") and not text_setting(model, "new_decoder_architecture"):
        kv_heads = 1
    size = text_setting(model, "head_dim") or hidden // heads
    if not isinstance(kv_heads, int) or not isinstance(size, int):  # such as a list, one number a layer
        return None
    return int(2 * layers * kv_heads * size * model.dtype.itemsize)


def too_large(size: RolloutSize, reason: str) -> str:
    """Say what a rollout takes, and what it would take with each setting halved; `reason` is the device's own words."""
    lower = [
        ("data.batch_size", "prompts", size.prompts),
        ("group_size", "group_size", size.group_size),
        ("sampling.max_new_tokens", "new_tokens", size.new_tokens),
    ]
    halves, cache = [f"`{setting}` {value} -> {value // 2}" for setting, _, value in lower if value > 1], ""
    if size.bytes_per_token is not None:
        cache = f"Keys and values take {_gb(size.cache_bytes)} ({size.bytes_per_token / 1e3:.3g} kB a token), "
        halves = [
            f"`{setting}` {value} -> {value // 2}: {_gb(replace(size, **{field: value // 2}).cache_bytes)}"  # type: ignore[arg-type]
            for setting, field, value in lower
            if value > 1
        ]
    logits = f"{'logits' if cache else 'Logits take'} {_gb(size.logit_bytes)}"
    return (
        f"The device ran out of memory while completions were sampled: {reason}\n"
        f"The rollout: {counted(size.rows, 'completion')} ({counted(size.prompts, 'prompt')} x {size.group_size}), "
        f"prompts of up to {counted(size.prompt_tokens, 'token')}, up to {size.new_tokens} new ones. "
        f"{cache}{logits}, and the weights come on top.\n"
        f"Lower one of these{' (keys and values then)' if cache else ''}: {'; '.join(halves)} (while evaluating: "
        "`data.eval_batch_size`). "
        "`policy.sampling_weights: quantized` holds no second copy of the weights. The last checkpoint stands: "
        "`--ckpt_path last` goes on from it with more room; a smaller rollout is a new run."
    )


def _gb(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
