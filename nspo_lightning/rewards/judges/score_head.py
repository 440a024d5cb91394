"""Reward and cost models whose head is no transformers class: a backbone and a linear layer on the last token.

PKU's beaver models (`LlamaModelForScore`) and their kin keep a language model's backbone under `model.` and a head
`score_head` that maps each hidden state to one score; the score of a text is the one at its last token. Their classes
come with their own code base. Here the backbone is loaded by `AutoModel`, the head is read from the checkpoint's
tensors: no remote code, any backbone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning.rewards.judges.local_model import DType, load_judge_model

HEAD_NAMES = ("score_head", "v_head.summary", "v_head", "reward_head", "value_head", "regression_layer", "score")
"""Where heads are kept, in the order in which they are looked for."""


class ScoreModel(nn.Module):
    """A backbone with a linear head.

    Args:
        backbone: Gives hidden states of shape (batch, seq, width).
        weight: The head's, shape (scores, width).
        bias: The head's, shape (scores,), or None.
        mean: What is subtracted from scores, for models that normalise them.
        std: What they are divided by then.
    """

    def __init__(
        self, backbone: nn.Module, weight: Tensor, bias: Tensor | None, mean: Tensor | None, std: Tensor | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            if bias is not None:
                self.head.bias.copy_(bias)
        self.mean, self.std = mean, std

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score texts padded on the right, ids and mask of shape (batch, seq): float32 of shape (batch, scores)."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        last = attention_mask.sum(1) - 1
        scores: Tensor = self.head(hidden[torch.arange(len(last), device=last.device), last].float())
        if self.mean is not None and self.std is not None:
            scores = (scores - self.mean.to(scores.device)) / self.std.to(scores.device)
        return scores


def is_score_checkpoint(config: Any) -> bool:
    """Tell a checkpoint with such a head by its transformers config: a `...ForScore`, or one with a `score_dim`."""
    architecture = (config.architectures or [""])[0]
    return architecture.endswith("ForScore") or "score_dim" in config.to_dict()


def load_score_model(model: str, config: Any, device: torch.device, dtype: DType, load_in_4bit: bool) -> ScoreModel:
    """Load a backbone, frozen and in eval mode, and find its head, which is float32 whatever the backbone is."""
    from transformers import AutoModel

    tensors = _head_tensors(model)
    name = next((name for name in HEAD_NAMES if f"{name}.weight" in tensors), None)
    if name is None:
        raise ValueError(
            f"The checkpoint '{model}' has no score head: none of its tensors is named {', '.join(HEAD_NAMES)} "
            f"(.weight). Use a reward or cost model."
        )
    mean = std = None
    if config.to_dict().get("do_normalize") and "normalizer.mean" in tensors:
        mean, std = tensors["normalizer.mean"].float(), tensors["normalizer.var"].float().sqrt()
    backbone = load_judge_model(model, AutoModel, device, dtype, load_in_4bit)
    bias = tensors.get(f"{name}.bias")
    scorer = ScoreModel(backbone, tensors[f"{name}.weight"].float(), None if bias is None else bias.float(), mean, std)
    scorer.head.to(device)
    return scorer.eval().requires_grad_(False)


def _head_tensors(model: str) -> dict[str, Tensor]:
    """Read the small tensors that may belong to a head, without loading the backbone."""
    wanted = {f"{name}.{part}" for name in HEAD_NAMES for part in ("weight", "bias")}
    wanted |= {"normalizer.mean", "normalizer.var"}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (index := _file(model, f"{single}.index.json")) is not None:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = [_file(model, shard) for shard in {weight_map[name] for name in wanted & set(weight_map)}]
        elif (path := _file(model, single)) is not None:
            shards = [path]
        else:
            continue
        return {name: tensor for shard in shards if shard for name, tensor in _read(shard, wanted).items()}
    raise ValueError(f"'{model}' holds no model.safetensors or pytorch_model.bin. Check the hub id or path.")


def _read(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted & set(file.keys())}
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: state[name].clone() for name in wanted & set(state)}


def _file(model: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        return Path(cached_file(model, name))
    except OSError:  # it is not there, or the hub can't be reached
        return None
