"""``python -m nspo_lightning export``: a PEFT adapter, or a merged model, with a model card, out of a checkpoint.

The folder appears complete or not at all. Making an adapter loads no model: the checkpoint holds it, and PEFT's file
format is a rename of its keys (`base_model.model.<layer>.lora_A.weight`).
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nspo_lightning.cli.run_config import find_config, policy_settings, read_config
from nspo_lightning.compat.bitsandbytes import hide_missing_kernel
from nspo_lightning.compat.peft import DOWN, UP, name_in_file
from nspo_lightning.export.card import card, leak_sentence, no_basis_sentence, rounding_sentences
from nspo_lightning.export.merge import DTYPES, MergedLayer, certificates, merge_, unquantised_base
from nspo_lightning.export.trained import PREFIX, ExportSource, export_source, read_trained
from nspo_lightning.policy.adapter import lora_config
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.policy.tokenizer import load_tokenizer

DESCRIPTION = """Write what a run has trained as a folder that PEFT, transformers and vLLM load.

  export --ckpt runs/nspo/checkpoints/last.ckpt --out my-adapter
  export --ckpt runs/nspo/checkpoints/last.ckpt --out my-model --merge --dtype bfloat16
"""
MARKERS = ("adapter_config.json", "config.json")


def main(arguments: list[str]) -> None:
    """Run the subcommand.

    Args:
        arguments: What follows ``export``.
    """
    parsed = _parser().parse_args(arguments)
    if parsed.dtype is not None and not parsed.merge:
        _parser().error("--dtype is of the merged model: add --merge (an adapter keeps the float32 it was trained in)")
    checkpoint, out = Path(parsed.ckpt), Path(parsed.out)
    check_out(out, checkpoint, overwrite=parsed.overwrite)
    content = read_trained(checkpoint)
    config_file = _path(parsed.config) or find_config(checkpoint)
    config = read_config(config_file)
    settings = policy_settings(config, config_file)
    source = export_source(checkpoint, content, config_file, config, settings, _path(parsed.basis))
    lines = export_merged(source, out, parsed.dtype or "bfloat16") if parsed.merge else export_adapter(source, out)
    print("\n".join(lines))


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nspo_lightning export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a run (runs/NAME/checkpoints/...)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--config", metavar="FILE", help="config.yaml of the run, if not beside or above the checkpoint"
    )
    parser.add_argument("--basis", metavar="FILE", help="basis file of the run, if it has moved")
    parser.add_argument("--merge", action="store_true", help="write a full model from the unquantised base")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged model (default: bfloat16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    return parser


def check_out(out: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything but an earlier export.

    Args:
        out: Where the export will be.
        checkpoint: What is exported.
        overwrite: Replace an earlier export.

    Raises:
        ValueError: Saying what is in the way.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"`--out` must be a folder, and {out} is a file. Give another one.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty. Give another `--out`, or replace what is there with `--overwrite`.")
    if not any((out / marker).is_file() for marker in MARKERS) or checkpoint.resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"{out} does not hold an earlier export, so `--overwrite` leaves it alone. Give another `--out`."
        )


def export_adapter(source: ExportSource, out: Path) -> list[str]:
    """Write the adapter in PEFT's format.

    Args:
        source: The checkpoint.
        out: The folder.

    Returns:
        What to tell the user.

    Raises:
        PolicyError: If there is no adapter, or its base exists in the run's memory only.
    """
    if source.settings.lora is None:
        raise PolicyError("The run trained whole weights (`policy.lora: null`): there is no adapter. Add `--merge`.")
    if source.settings.adapter is not None:
        raise PolicyError(
            f"The adapter belongs on '{source.settings.path}' with '{source.settings.adapter}' merged into it, and no "
            "folder holds that base. Export the sum of all three with `--merge`."
        )
    found = certificates(source)
    notes: list[str] = []

    def write(folder: Path) -> None:
        _write_adapter(source, folder)
        try:
            load_tokenizer(source.settings).save_pretrained(str(folder))
        except PolicyError as error:
            notes.append(f"No tokenizer beside it: {error}")
        text = card(source, certificates=found, merged=None, dtype="float32", name=out.absolute().name)
        (folder / "README.md").write_text(text, encoding="utf-8")

    _appear(out, write)
    leak = f"Certificate: {leak_sentence(found)}." if found else no_basis_sentence(source)
    return [f"Adapter of {len(source.adapter())} layers after {source.updates} updates: {out}", leak, *notes]


def _write_adapter(source: ExportSource, folder: Path) -> None:
    hide_missing_kernel()  # peft imports bitsandbytes
    from safetensors.torch import save_file

    lora = source.settings.lora
    assert lora is not None
    layers = source.adapter()
    changes: dict[str, Any] = {
        "base_model_name_or_path": source.settings.model_path,
        "revision": source.settings.revision,
        "inference_mode": True,
    }
    if lora.target_modules == "all-linear":  # it becomes the names that it stood for, as PEFT itself does
        changes["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    lora_config(lora, **changes).save_pretrained(str(folder))
    tensors = {}
    for name, layer in layers.items():
        inner = name.removeprefix(PREFIX)
        tensors[inner + name_in_file(DOWN)] = layer.down.contiguous()
        tensors[inner + name_in_file(UP)] = layer.up.contiguous()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def export_merged(source: ExportSource, out: Path, dtype: str) -> list[str]:
    """Write a full model: the unquantised base plus the update, rounded once.

    Args:
        source: The checkpoint.
        out: The folder.
        dtype: One of `DTYPES`.

    Returns:
        What to tell the user: among it, what rounding did to the null space.
    """
    tokenizer = load_tokenizer(source.settings)
    base = unquantised_base(source)
    layers: list[MergedLayer] = merge_(base, source, dtype)  # type: ignore[arg-type]

    def write(folder: Path) -> None:
        base.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        text = card(source, certificates=certificates(source), merged=layers, dtype=dtype, name=out.absolute().name)
        (folder / "README.md").write_text(text, encoding="utf-8")

    _appear(out, write)
    said = rounding_sentences(layers, dtype, no_basis_sentence(source))
    return [f"Model with {len(layers)} merged matrices in {dtype} after {source.updates} updates: {out}", *said]


def _appear(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place and move it there: nobody ever sees half of it."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    partial.mkdir()
    try:
        write(partial)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
