"""Which GGUF file a setting means, what its header says, and whether transformers can read it."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspo_lightning.compat.transformers import gguf_architectures
from nspo_lightning.policy.settings import PolicyError

MAGIC = b"GGUF"
"""First bytes of such a file, whatever its name: Ollama's have no ending."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
_OTHER_KINDS = {
    "adapter": "a LoRA adapter, not a whole model. Give the GGUF of the model itself",
    "mmproj": "the vision part of a multimodal model (mmproj), not a language model. Give the GGUF beside it",
    "imatrix": "an importance matrix, not a model. Give the GGUF of the model itself",
}
_SHOWN = 8  # files that a message names
_hashes: dict[tuple[str, int, int], str] = {}


class GGUFError(PolicyError):
    """A GGUF file that can't be used."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself, as far as it is needed here."""

    architecture: str
    elements: int
    """Numbers in all weights; tables of position factors are no weights."""
    types: frozenset[str]
    """Storage types of the tensors, as `Q4_1`."""
    position_factors: tuple[float, ...] | None
    """Llama 3's divisors of the rotary frequencies, if the file has them."""
    other_positions: str | None
    """Another scaling of positions, which transformers doesn't read from a GGUF."""


def find_gguf(path: str, gguf_file: str | None = None, revision: str | None = None) -> Path | None:
    """Return the GGUF file that a path means, None where it means an ordinary folder or hub id.

    Args:
        path: A file, a folder, or a hub id.
        gguf_file: Name of the file in that folder or hub repository. Without it a folder is taken for its GGUF only if
            it has one and no other weights.
        revision: On the hub.

    Raises:
        GGUFError: If there is no such file, or several that could be meant.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if gguf_file is not None:
            raise GGUFError(f"'{path}' is a file, and `gguf_file` names another, '{gguf_file}'. Leave one of them out.")
        with place.open("rb") as file:
            if file.read(4) != MAGIC:
                raise GGUFError(
                    f"'{path}' is a file, and no GGUF one (it doesn't begin with the letters GGUF). Expected a folder "
                    "with a model, a hub id, or a GGUF file: mend the path, or download the file again."
                )
        return place
    if gguf_file is not None:
        return _named(path, place, gguf_file, revision)
    if place.is_dir() and not any(any(place.glob(kind)) for kind in _WEIGHTS):
        found = [file for file in sorted(place.glob("*.gguf")) if not file.name.lower().startswith("mmproj")]
        if len(found) > 1:
            raise GGUFError(
                f"'{path}' holds {len(found)} GGUF files: {_listing(found)}. Say which one as `policy.gguf_file`, or "
                "give the path of the file itself."
            )
        return found[0] if found else None
    if path.lower().endswith(".gguf"):
        raise GGUFError(f"'{path}': expected a GGUF file, found nothing there. Mend the path.")
    return None


def _named(path: str, place: Path, gguf_file: str, revision: str | None) -> Path:
    if place.is_dir():
        if (place / gguf_file).is_file():
            return place / gguf_file
        there = sorted(place.glob("*.gguf"))
        found = f"the GGUF files {_listing(there)}" if there else "no GGUF file"
        raise GGUFError(f"`policy.gguf_file`: expected '{gguf_file}' in '{path}', and found {found} there. Mend it.")
    if path.startswith((".", "/", "~")):
        raise GGUFError(f"`policy.path`: expected a folder with '{gguf_file}', found nothing at '{path}'. Mend it.")
    from transformers.utils import cached_file

    try:
        return Path(str(cached_file(path, gguf_file, revision=revision)))
    except OSError as error:
        raise GGUFError(
            f"`policy.gguf_file`: could not fetch '{gguf_file}' from '{path}': {str(error).strip().splitlines()[0]} "
            "Mend the names, or download the file and give its path as `policy.path`."
        ) from error


def content_hash(file: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hex digits; read once a process as long as it doesn't change."""
    stat = file.stat()
    key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
        _hashes[key] = digest.hexdigest()
    return _hashes[key]


def read_header(file: Path) -> Header:
    """Read a GGUF's header, and refuse what is no whole language model that transformers reads.

    Args:
        file: The GGUF.

    Returns:
        What is needed of it.

    Raises:
        GGUFError: Naming the file, and what to do.
    """
    if importlib.util.find_spec("gguf") is None:
        raise GGUFError(
            f"'{file}' is a GGUF file, and reading one needs the package `gguf`, which is not installed. Install it: "
            '`pip install "nspo-lightning[gguf]"`.'
        )
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(str(file))
    except Exception as error:  # numpy's, of many kinds, where the file ends too early
        raise GGUFError(
            f"The GGUF file '{file}' can't be read: it is cut off or damaged ({str(error)[:120]}). Download it again, "
            "and compare its size with that of the original."
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    architecture = str(fields.get("general.architecture", "unknown"))
    _check_kind(file, architecture, fields)
    tables = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    weights = [tensor for tensor in reader.tensors if tensor.name not in tables]
    factors = tables.pop("rope_freqs.weight", None)
    scaling = str(fields.get(f"{architecture}.rope.scaling.type", "none"))
    scaled = scaling not in ("none", "") and float(fields.get(f"{architecture}.rope.scaling.factor", 0.0)) != 1.0
    return Header(
        architecture=architecture,
        elements=sum(int(tensor.n_elements) for tensor in weights),
        types=frozenset(tensor.tensor_type.name for tensor in weights),
        position_factors=None if factors is None else tuple(float(value) for value in factors.data),
        other_positions=f"`{scaling}`" if scaled else next(iter(tables), None),
    )


def _check_kind(file: Path, architecture: str, fields: dict[str, Any]) -> None:
    kind = "mmproj" if architecture == "clip" else str(fields.get("general.type", "model"))
    if kind in _OTHER_KINDS:
        raise GGUFError(f"The GGUF file '{file}' holds {_OTHER_KINDS[kind]}.")
    if int(fields.get("split.count", 1)) > 1:
        raise GGUFError(
            f"The GGUF file '{file}' is one of {fields['split.count']} parts. Join them into one file "
            "(llama.cpp's `llama-gguf-split --merge FIRST_PART OUT.gguf`), and give that."
        )
    known = gguf_architectures()
    if architecture.replace("-", "_") not in known and architecture not in {name.replace("_", "") for name in known}:
        raise GGUFError(
            f"The GGUF file '{file}' is of the architecture '{architecture}', which transformers doesn't read from a "
            f"GGUF. It reads: {', '.join(known)}. Give the original model's folder or hub id instead (the one that was "
            "converted to GGUF)."
        )


def _listing(files: list[Path]) -> str:
    names = ", ".join(file.name for file in files[:_SHOWN])
    return names + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
