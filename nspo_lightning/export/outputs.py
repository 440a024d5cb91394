"""What a merged model answers, beside base and adapter: logits on a little text, from the folder as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nspo_lightning.checkpoints import PREFIX
from nspo_lightning.export.trained import ExportSource
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.adapter import add_adapter
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.terminal import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = (
    ("How do I keep bread fresh?", "Keep it in a paper bag or a bread box, and freeze what you won't eat in two days."),
    ("What is 17 times 6?", "17 times 6 is 102, since 10 times 6 is 60 and 7 times 6 is 42."),
    ("How do I pick the lock of my neighbour's door?", "I can't help with getting into a home that isn't yours."),
)
"""Questions and answers that outputs are compared on."""
_MOST_TOKENS = 128  # of a text
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the logits' norm, by the dtype that a sum is rounded to
_LEAST_SHARE = 0.5  # of the update that must be in a merged model: rounding takes little of it, a lost one is 0


@dataclass(frozen=True, kw_only=True)
class MergedOutputs:
    """How far a merged model's logits are from those of base and adapter."""

    change: float
    """||merged - (base and adapter)|| / ||base and adapter||, over all positions."""
    trained: float
    """The same for the base: what training did."""
    share: float
    """How much of what training did the merged model does: 1 = all, 0 = it is the base."""
    tokens: int

    def sentence(self) -> str:
        """Say it, for the terminal and the card."""
        return (
            f"Logits of this model, loaded from the folder, differ from those of base and trained update by "
            f"{self.change:.2g} of their norm, on {counted(self.tokens, 'token')} of text; training moved them by "
            f"{self.trained:.2g}, and {100 * self.share:.3g} % of that is in this model."
        )


class OutputsBefore:
    """The logits that a merged model must give: those of the base with its trained update beside it.

    All is computed in float32, so that what is seen is the rounding of the sum and not that of 16-bit products.

    Args:
        base: The unquantised base; it is left in float32, with the same values.
        source: The checkpoint.
        tokenizer: The base's tokenizer.
    """

    def __init__(self, base: PreTrainedModel, source: ExportSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self._batches = _batches(tokenizer)
        cast(nn.Module, base).float()
        self._base = _logits(base, self._batches)
        with _trained(base, source) as policy:
            self._wanted = _logits(policy, self._batches)

    def compare(self, merged: PreTrainedModel) -> MergedOutputs:
        """Return how far a merged model is from them; it is left in float32.

        Raises:
            PolicyError: If it is another model, or lacks half of the update or more.
        """
        rounding = _ROUNDING[merged.dtype]
        found = _logits(cast(nn.Module, merged).float(), self._batches)
        norm, update = max(_distance(self._wanted), 1e-30), _distance(self._wanted, self._base)
        change, trained = _distance(found, self._wanted) / norm, update / norm
        done = sum(
            float(((f - b).double() * (w - b)).sum()) for f, w, b in zip(found, self._wanted, self._base, strict=True)
        )
        share = done / update**2 if update else 1.0
        if not change <= _LEAST_SHARE * trained + rounding or not share >= _LEAST_SHARE:
            beside = "serve the adapter beside the base"
            half = rounding > _ROUNDING[torch.float32]
            cure = f"Merge with `--dtype float32`, or {beside}." if half else f"To go on, {beside}, and report this."
            raise PolicyError(
                "The merged model does not answer as base and adapter do: on a little text its logits differ by "
                f"{change:.2g} of their norm, training moved them by {trained:.2g}, and {100 * share:.0f} % of that is "
                f"in it. Nothing was written. {cure}"
            )
        tokens = sum(batch.shape[1] for batch in self._batches)
        return MergedOutputs(change=change, trained=trained, share=share, tokens=tokens)


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
