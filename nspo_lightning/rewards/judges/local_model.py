"""A judge's model on this machine: loaded on the policy's device or another, in 4 bits if asked, and fed in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nspo_lightning.policy.gguf import model_folder

DType = Literal["auto", "float32", "bfloat16", "float16"]
Side = Literal["left", "right"]


def resolve_device(device: str | None) -> torch.device:
    """Choose a judge's device; None means the policy's, which Lightning makes the current one."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_judge_tokenizer(model: str) -> Any:
    """Load a judge's tokenizer from the hub, a folder or a GGUF file, and give it a padding token if it has none."""
    from transformers import AutoTokenizer

    folder = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded("tokenizer", model, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_judge_config(model: str) -> Any:
    """Load the configuration of a judge's model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_folder(model))


def load_judge_model(model: str, auto_class: Any, device: torch.device, dtype: DType, load_in_4bit: bool) -> Any:
    """Load a judge's model, frozen and in eval mode; in 4 bits it is NF4 with double quantisation, heads excepted."""
    options: dict[str, Any] = {}
    if load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            llm_int8_skip_modules=["lm_head", "score", "classifier", "score_head"],
        )
        options["device_map"] = {"": device}
    folder = model_folder(model)
    try:
        loaded = auto_class.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_loaded("model", model, error)) from error
    if not load_in_4bit:
        loaded = loaded.to(device)
    return loaded.eval().requires_grad_(False)


def context_limit(config: Any) -> int | None:
    """Return how many tokens a model of this transformers config can read, if the config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def padded(rows: Sequence[Sequence[int]], value: int, side: Side) -> Tensor:
    """Pad rows of token ids to shape (rows, longest); on the left, the last column is every row's last token."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def padded_batches(
    rows: Sequence[Sequence[int]], batch_size: int, pad_token_id: int, device: torch.device, side: Side
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batch rows of like length, so that little is padded.

    Args:
        rows: Token ids.
        batch_size: Rows in a batch at most.
        pad_token_id: Token that fills rows up.
        device: Where the tensors go.
        side: The side on which rows are filled up.

    Yields:
        The rows' indices with their `input_ids` and `attention_mask` (1 = real token), each of shape (rows, longest);
        the longest rows first, so that what is too large for the memory shows at once.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        ids = padded([rows[i] for i in group], pad_token_id, side)
        mask = padded([[1] * len(rows[i]) for i in group], 0, side)
        yield group, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _not_loaded(what: str, model: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return (
        f"The judge's {what} could not be loaded from '{model}': {first_line} Check the hub id or path, and for gated "
        f"models accept the licence and log in."
    )
