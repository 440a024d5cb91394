"""Convert a GGUF file into a folder with plain weights and a tokenizer, and check what came out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nspo_lightning.atomic import write_json
from nspo_lightning.compat.transformers import without_gguf_
from nspo_lightning.policy.gguf.english import LIMIT, PAGE, nll_per_token
from nspo_lightning.policy.gguf.file import GGUFError, Header, content_hash

RECORD = "gguf.json"
"""In a converted folder: which file it is, and what was checked."""
FLOAT32_ELEMENTS = 1_500_000_000
"""Up to so many numbers the unpacked weights are kept in float32, exactly; above in 16 bits."""
_ORIGINAL = "Give the original model's folder or hub id instead (the one that was converted to GGUF)"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Settings that all Llama 3.x have; the factor is in the file."""


def convert(file: Path, header: Header, folder: Path) -> dict[str, Any]:
    """Write a GGUF's model and tokenizer into an empty folder, as `from_pretrained` loads them.

    Args:
        file: The GGUF.
        header: Header of the file.
        folder: The folder to write to.

    Returns:
        The record of it, which is written there too, last.

    Raises:
        GGUFError: If transformers can't read it, or what it read is not the model that the file holds.
    """
    dtype = stored_dtype(header)
    needed, free = header.elements * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise GGUFError(
            f"The weights of '{file}', unpacked, take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
            f"{folder.parent}. Make room there, or set NSPO_LIGHTNING_CACHE to a folder on a larger disk."
        )
    _write(file, header, folder, dtype)
    record = {
        "file": file.name,
        "sha256": content_hash(file),
        "architecture": header.architecture,
        "types": sorted(header.types),
        "parameters": header.elements,
        "dtype": str(dtype).removeprefix("torch."),
        "nll_per_token": round(_check_english(file, folder), 4),
        "nll_limit": LIMIT,
        "versions": {name: version(name) for name in ("transformers", "gguf")},
    }
    write_json(record, folder / RECORD)
    return record


def stored_dtype(header: Header) -> torch.dtype:
    """Return the dtype of unpacked weights: float16 holds 4 to 8 bits times a float16 scale best of the 16-bit ones."""
    if header.elements <= FLOAT32_ELEMENTS:
        return torch.float32
    return torch.bfloat16 if "BF16" in header.types else torch.float16


def _write(file: Path, header: Header, folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=dtype, output_loading_info=True, **where
        )
    except Exception as error:  # the readers raise whatever a header makes them stumble over
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GGUFError(f"transformers could not read the GGUF file '{file}': {first[:300]} {_ORIGINAL}.") from error
    missing = sorted(info["missing_keys"])
    elements = sum(parameter.numel() for parameter in model.parameters())
    if missing or elements != header.elements:
        lacks = f"lacks {missing[0]} and {len(missing) - 1} more" if missing else "does not hold the same weights"
        raise GGUFError(
            f"The GGUF file '{file}' ({header.elements:,} numbers) {lacks}: transformers makes a model of {elements:,} "
            f"numbers of it, which is another model. {_ORIGINAL}."
        )
    _set_positions_(model.config, header, file)
    without_gguf_(model)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _set_positions_(config: Any, header: Header, file: Path) -> None:
    """Give a configuration the scaling of positions that its file has and transformers passes over."""
    rope = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    if rope.get("rope_type", "default") != "default":
        return  # it was read
    if header.position_factors is not None:
        found = llama3_scaling(header.position_factors, float(rope.get("rope_theta", 0.0)))
        if found is not None:
            config.rope_parameters = {**rope, **found}
            return
    scaling = "`rope_freqs`" if header.position_factors is not None else header.other_positions
    if scaling is not None:
        raise GGUFError(
            f"The GGUF file '{file}' scales its positions ({scaling}), which transformers does not read from a GGUF: "
            f"the model would be another one. {_ORIGINAL}."
        )


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Return Llama 3's rotary settings that give these divisors of the frequencies, None if none do."""
    if not factors or theta <= 0:
        return None
    low, high, length = (float(value) for value in _LLAMA3.values())
    factor = round(max(factors), 3)

    def divisor(place: int) -> float:
        turns = length * theta ** (-place / len(factors)) / (2 * math.pi)  # over the context trained on at first
        smooth = (turns - low) / (high - low)
        return 1.0 if turns > high else factor if turns < low else 1 / ((1 - smooth) / factor + smooth)

    same = all(math.isclose(f, divisor(place), rel_tol=1e-3) for place, f in enumerate(factors))
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3} if same else None


def _check_english(file: Path, folder: Path) -> float:
    """Return the NLL a token of the page, by the folder's own model; GGUFError if it is no language model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").eval()
    if model.dtype == torch.float16:  # slow on CPUs
        model.to(torch.bfloat16)
    found = nll_per_token(model, tokenizer(PAGE, return_tensors="pt")["input_ids"])
    if not found <= LIMIT:
        raise GGUFError(
            f"The GGUF file '{file}' was read, and the model that came out predicts plain English with an NLL of "
            f"{found:.2f} nats a token; at most {LIMIT} was expected of a model that was read rightly. Its weights are "
            f"damaged, in an order that transformers doesn't know, or it is no model of English. {_ORIGINAL}."
        )
    return found
