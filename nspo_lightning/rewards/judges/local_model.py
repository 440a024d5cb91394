"""Load a judge's model: on the policy's device or another, in 4 bits if asked, from a hub id or a folder."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["DType", "batches_by_length", "load_model", "load_tokenizer", "padded", "resolve_device"]

DType = Literal["auto", "float32", "bfloat16", "float16"]


def resolve_device(device: str | None) -> torch.device:
    """Choose a judge's device.

    Args:
        device: `cpu`, `cuda:1`, ...; None means the policy's, which Lightning makes the current one.

    Returns:
        The device.
    """
    if device is not None:
        return torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(model: str) -> Any:
    """Load a judge's tokenizer, padding on the left.

    Args:
        model: hub id or folder.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded("tokenizer", model, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    model: str, auto_class: Any, device: torch.device, dtype: DType = "auto", load_in_4bit: bool = False, **options: Any
) -> Any:
    """Load a judge's model, frozen and in eval mode.

    Args:
        model: hub id or folder.
        auto_class: transformers class to load it with.
        device: where it runs.
        dtype: its number format; `auto` is the checkpoint's.
        load_in_4bit: NF4 with double quantisation, through bitsandbytes; heads stay as they are.
        **options: passed to `from_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: if it can't be loaded.
    """
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
    try:
        loaded = auto_class.from_pretrained(model, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_loaded("model", model, error)) from error
    if not load_in_4bit:
        loaded = loaded.to(device)
    return loaded.eval().requires_grad_(False)


def padded(
    rows: list[list[int]], pad_token_id: int, device: torch.device, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """Pad token rows; on the left, the last column is every row's last token.

    Args:
        rows: token ids.
        pad_token_id: what fills up.
        device: where the tensors go.
        side: where it fills up.

    Returns:
        `input_ids`, `attention_mask` (1 = real token) and `position_ids`, each of shape (rows, longest).
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device)}


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Group samples of like length, so that little is padded.

    Args:
        lengths: one a sample.
        batch_size: largest group.

    Returns:
        Groups of sample indices, longest first (what is too large for the memory shows at once).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _not_loaded(what: str, model: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return (
        f"The judge's {what} could not be loaded from '{model}': {first_line} Check the hub id or path, and for gated "
        f"models accept the licence and log in."
    )
