"""Write an export: a folder with a PEFT adapter or a merged model, and a model card, complete or not at all.

Making an adapter loads no model: the checkpoint holds it, and PEFT's file format is a rename of its keys
(`base_model.model.<layer>.lora_A.weight`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nspo_lightning.atomic import replacing_folder, write_json
from nspo_lightning.checkpoints import PREFIX
from nspo_lightning.compat.bitsandbytes import hide_missing_kernel
from nspo_lightning.compat.peft import DOWN, MODEL_PREFIX, UP, name_in_file
from nspo_lightning.export.card import (
    broken_promise,
    card,
    leak_sentence,
    no_basis_sentence,
    rounding_sentences,
    untied_sentences,
)
from nspo_lightning.export.merge import Dtype, certificates, merge_, merged_from, unquantised_base
from nspo_lightning.export.outputs import OutputsBefore
from nspo_lightning.export.trained import ExportSource
from nspo_lightning.policy.adapter import lora_config
from nspo_lightning.policy.base_record import RECORD, base_record
from nspo_lightning.policy.loading import loadable_folder
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.policy.tokenizer import load_tokenizer
from nspo_lightning.policy.warm_start import WarmStart
from nspo_lightning.terminal import counted, rows_progress

WARNING = "WARNING:"


def export_adapter(source: ExportSource, out: Path) -> list[str]:
    """Write the adapter in PEFT's format, and return what to tell the user."""
    if source.settings.lora is None:
        raise PolicyError("The run trained whole weights (`policy.lora: null`): there is no adapter. Add `--merge`.")
    if source.settings.merged is not None:
        raise PolicyError(
            f"The adapter belongs on '{source.settings.path}' with '{source.settings.merged}' merged into it, and no "
            "folder holds that base. Export the sum of all three with `--merge`."
        )
    found = certificates(source)
    notes: list[str] = []
    with replacing_folder(out) as folder:
        _write_adapter(source, folder)
        write_json(base_record(source.settings, source.state["policy"]), folder / RECORD)
        try:
            load_tokenizer(source.settings).save_pretrained(str(folder))
        except PolicyError as error:
            notes.append(f"No tokenizer beside it: {error}")
        text = card(source, certificates=found, merged=None, dtype="float32", name=out.absolute().name)
        (folder / "README.md").write_text(text, encoding="utf-8")
        WarmStart(
            policy=source.state["policy"],
            policy_path=source.settings.path,
            basis=None if source.projection is None else source.projection["fingerprint"],
            leak=max((certificate.leak for certificate in found), default=None),
        ).write(folder)
    leak = f"Certificate: {leak_sentence(found)}." if found else no_basis_sentence(source)
    return [
        f"Adapter of {counted(len(source.adapter()), 'layer')} after {counted(source.updates, 'update')}: {out}",
        leak,
        *notes,
    ]


def _write_adapter(source: ExportSource, folder: Path) -> None:
    hide_missing_kernel()  # peft imports bitsandbytes
    from safetensors.torch import save_file

    lora = source.settings.lora
    assert lora is not None
    layers = source.adapter()
    changes: dict[str, Any] = {
        "base_model_name_or_path": loadable_folder(source.settings),
        "revision": source.settings.revision,
        "inference_mode": True,
        # By whole names: parts that no text reaches may have layers of the same names.
        "target_modules": sorted(name.removeprefix(PREFIX).removeprefix(MODEL_PREFIX) for name in layers),
    }
    lora_config(lora, **changes).save_pretrained(str(folder))
    tensors = {}
    for name, layer in layers.items():
        inner = name.removeprefix(PREFIX)
        tensors[inner + name_in_file(DOWN)] = layer.down.contiguous()
        tensors[inner + name_in_file(UP)] = layer.up.contiguous()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def export_merged(source: ExportSource, out: Path, dtype: Dtype) -> list[str]:
    """Write the unquantised base plus the update, rounded once to `dtype`.

    Returns:
        What to tell the user; what is to be warned of comes last and begins with `WARNING`.
    """
    tokenizer = load_tokenizer(source.settings)
    with rows_progress("Merging", 5, unit="step") as advance, replacing_folder(out) as folder:
        base = unquantised_base(source)
        advance(note="running base and adapter")
        wanted = OutputsBefore(base, source, tokenizer)
        advance(note="adding the update")
        layers = merge_(base, source, dtype)
        advance(note="writing")
        base.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        del base  # one model at a time
        advance(note="reading it back and comparing")
        outputs = wanted.compare(merged_from(folder, source, dtype))
        advance()
        said = [outputs.sentence(), *untied_sentences(layers)]
        said += rounding_sentences(layers, dtype, no_basis_sentence(source))
        warning, name = broken_promise(layers, dtype), out.absolute().name
        text = card(source, certificates=certificates(source), merged=said, dtype=dtype, name=name, warning=warning)
        (folder / "README.md").write_text(text, encoding="utf-8")
    told = [
        f"Model with {counted(len(layers), 'merged matrix', 'merged matrices')} in {dtype} after "
        f"{counted(source.updates, 'update')}: {out}",
        *said,
    ]
    return told if warning is None else [*told, f"{WARNING} {warning}"]
