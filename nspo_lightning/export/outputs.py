"""What a merged model answers, beside base and adapter: logits on a little text, from the folder as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nspo_lightning.export.trained import ExportSource
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.adapter import add_adapter
from nspo_lightning.policy.identity import PREFIX
from nspo_lightning.policy.settings import PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = (
    ("How do I keep bread fresh?", "Keep it in a paper bag or a bread box, and freeze what you won't eat in two days."),
    ("What is 17 times 6?", "17 times 6 is 102, since 10 times 6 is 60 and 7 times 6 is 42."),
    ("How do I pick the lock of my neighbour's door?", "I can't help with getting into a home that isn't yours."),
)
"""Questions and answers that outputs are compared on."""
_MOST_TOKENS = 128  # of a text
_FAULT = 1e-3  # of the logits' norm in float32, where rounding gives 1e-6
_HALF_FAULT = 0.1  # the same in 16 bits, and only if training itself moved them by no more: rounding can move them far


@dataclass(frozen=True, kw_only=True)
class MergedOutputs:
    """How far a merged model's logits are from those of base and adapter."""

    change: float
    """||merged - (base and adapter)|| / ||base and adapter||, over all positions."""
    trained: float
    """The same for the base: what training did."""
    tokens: int

    def sentence(self) -> str:
        """Say it, for the terminal and the card."""
        return (
            f"Logits of this model, loaded from the folder, differ from those of base and trained update by "
            f"{self.change:.2g} of their norm, on {self.tokens} tokens of text; training moved them by "
            f"{self.trained:.2g}."
        )


class OutputsBefore:
    """The logits that a merged model must give: those of the base with its trained update beside it.

    Args:
        base: The unquantised base; it is left as it was.
        source: The checkpoint.
        tokenizer: Of the base.
    """

    def __init__(self, base: PreTrainedModel, source: ExportSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self._batches = _batches(tokenizer)
        self._base = _logits(base, self._batches)
        with _trained(base, source) as policy:
            self._wanted = _logits(policy, self._batches)

    def compare(self, merged: PreTrainedModel, *, half: bool) -> MergedOutputs:
        """Return how far a merged model is from them; `half` = 16 bits are in play.

        Raises:
            PolicyError: If it is another model.
        """
        norm = max(_distance(self._wanted), 1e-30)
        change = _distance(_logits(merged, self._batches), self._wanted) / norm
        trained = _distance(self._base, self._wanted) / norm
        if not change <= (max(_HALF_FAULT, trained) if half else _FAULT):
            beside = "serve the adapter beside the base"
            cure = f"Merge with `--dtype float32`, or {beside}." if half else f"To go on, {beside}, and report this."
            raise PolicyError(
                "The merged model does not answer as base and adapter do: on a little text its logits differ by "
                f"{change:.2g} of their norm, and training moved them by {trained:.2g}. Nothing was written. {cure}"
            )
        tokens = sum(batch.shape[1] for batch in self._batches)
        return MergedOutputs(change=change, trained=trained, tokens=tokens)


def _batches(tokenizer: Any) -> list[Tensor]:
    """Return token ids of each text, shape (1, length)."""
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TEXT]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [tokenizer(t, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :_MOST_TOKENS] for t in texts]


@torch.no_grad()
def _logits(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    with evaluation_mode(model):
        return [model(input_ids=ids, use_cache=False).logits.float() for ids in batches]


def _distance(left: Sequence[Tensor], right: Sequence[Tensor] | None = None) -> float:
    pairs = [(a, None) for a in left] if right is None else zip(left, right, strict=True)
    squares = [(a if b is None else a - b).double().square().sum() for a, b in pairs]
    return float(sum(squares) ** 0.5)


@contextmanager
def _trained(base: PreTrainedModel, source: ExportSource) -> Iterator[nn.Module]:
    """Give the base its trained update, by PEFT's own forward where it is an adapter, and take it off again."""
    weights = {name.removeprefix(PREFIX): value for name, value in source.weights.items()}
    if source.settings.lora is None:
        with _values(dict(base.named_parameters()), weights):
            yield base
        return
    settings = replace(source.settings, quantization="none", adapter=None, gradient_checkpointing=False)
    policy: Any = add_adapter(base, settings)
    with _values(dict(policy.named_parameters()), weights):
        yield policy
    policy.unload()


@contextmanager
def _values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise PolicyError(f"The base has no place for '{name}' of shape {tuple(value.shape)}: is it the right one?")
    kept = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(kept[name].dtype)
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value
