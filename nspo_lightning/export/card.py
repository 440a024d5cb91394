"""The model card of an export: what it is, what it was made from, what was measured, and how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nspo_lightning.checkpoints import PREFIX
from nspo_lightning.compat.peft import MODEL_PREFIX
from nspo_lightning.evaluation.tables import markdown_table
from nspo_lightning.export.merge import MergedLayer
from nspo_lightning.export.trained import ExportSource
from nspo_lightning.nullspace import LayerCertificate
from nspo_lightning.policy.base_record import gguf_identity
from nspo_lightning.policy.loading import loadable_folder
from nspo_lightning.policy.settings import TOY
from nspo_lightning.terminal import counted

DATA_FIELDS = ("safety", "general", "system_prompt", "calibration_size", "calibration_text", "mixture", "seed")
RECIPE_FIELDS = (
    "optimizer",
    "scheduler",
    "group_size",
    "sampling",
    "objective",
    "scale_rewards",
    "num_iterations",
    "num_minibatches",
)
POLICY_FIELDS = (
    "quantization",
    "double_quantization",
    "dtype",
    "lora",
    "adapter",
    "merge_adapter",
    "chat_template_kwargs",
)
WORST = 5
_BROKEN_LEAK = 0.01
"""Share of an update's norm in the protected directions from which a merged model is warned of."""


def leak_sentence(certificates: Sequence[LayerCertificate]) -> str:
    """Say the largest leak of some layers."""
    worst = max(certificates, key=lambda c: c.leak)
    return f"largest leak {worst.leak:.2g} ({_short(worst.name)})"


def rounding_sentences(layers: Sequence[MergedLayer], dtype: str, no_basis: str) -> list[str]:
    """Say, for the terminal and the card, what rounding the merged weights did; `no_basis` if no leak is known."""
    moved = [layer for layer in layers if math.isfinite(layer.rounding)]
    lines = []
    if moved:
        lost = max(moved, key=lambda layer: layer.rounding)
        mean = math.fsum(layer.rounding for layer in moved) / len(moved)
        lines.append(
            f"Rounding W + D to {dtype} is {100 * mean:.2g} % of the update's norm on average, at most "
            f"{100 * lost.rounding:.2g} % ({_short(lost.name)})."
        )
    if still := len(layers) - len(moved):
        lines.append(
            f"The update of {still} of {len(layers)} matrices is zero: all that changes there is the base's own "
            f"rounding to {dtype}."
        )
    measured = [(layer.before, layer.after) for layer in layers if layer.before is not None and layer.after is not None]
    if not measured:
        return [*lines, no_basis]
    before, after = [b for b, _ in measured], [a for _, a in measured]
    part = f", measured on {len(measured)} of {len(layers)} matrices" if len(measured) < len(layers) else ""
    lines.append(
        f"Leak into the protected space ||D U_k|| / ||D||{part}, before rounding: {leak_sentence(before)}; "
        f"after: {leak_sentence(after)}."
    )
    lines.append(
        "Bound on a layer's relative output change on general text, before rounding: "
        f"{max(c.output_change for c in before):.2g}; after: {max(c.output_change for c in after):.2g}."
    )
    return lines


def broken_promise(layers: Sequence[MergedLayer], dtype: str) -> str | None:
    """Say that rounding took the promise of the null space from merged weights, and the way out; None if it is kept."""
    before = max((layer.before.leak for layer in layers if layer.before is not None), default=0.0)
    after = max((layer.after.leak for layer in layers if layer.after is not None), default=0.0)
    if after <= max(_BROKEN_LEAK, 2 * before):
        return None
    return (
        f"Rounded to {dtype}, this model does NOT keep the promise of the null space any more: the leak into the "
        f"protected space is {after:.2g}, that of the adapter {before:.2g}. Serve the adapter beside the base instead "
        "(`export` without `--merge`)" + ("." if dtype == "float32" else ", or merge with `--dtype float32`.")
    )


def untied_sentences(layers: Sequence[MergedLayer]) -> list[str]:
    """Say which layers have got a weight of their own, for the terminal and the card; nothing where none has."""
    return [
        f"{_short(layer.name)} has a weight of its own here; in the base it is that of {', '.join(layer.untied)}, "
        "which its update would have moved too. The folder's config says `tie_word_embeddings: false`."
        for layer in layers
        if layer.untied
    ]


def no_basis_sentence(source: ExportSource) -> str:
    """Say why there is nothing to measure a leak against."""
    if source.basis_path is not None:
        return f"The leak was not measured: the basis is not at {source.basis_path}. Give it as `--basis`."
    if source.projection is None:
        return "There is no leak to measure: the run had no null-space projection."
    return "The leak was not measured: the checkpoint names no basis file. Give it as `--basis`."


def card(
    source: ExportSource,
    *,
    certificates: Sequence[LayerCertificate],
    merged: Sequence[str] | None,
    dtype: str,
    name: str,
    warning: str | None = None,
) -> str:
    """Return a folder's card: Markdown with the hub's header.

    Args:
        source: The checkpoint.
        certificates: Of its adapter; empty if not measured.
        merged: What is to be said of a merged model, None for an adapter.
        dtype: Dtype of the written weights.
        name: Name of the folder.
        warning: What a reader must know before all else.
    """
    what = "A full model" if merged is not None else "A LoRA adapter (PEFT)"
    in_null_space = " with updates kept in the null space of general text"
    how = ", without null-space projection" if source.projection is None else in_null_space
    sections = {
        "Base": _base(source, merged is not None),
        "Data": _yaml(source.config.get("data"), DATA_FIELDS),
        "Recipe": _recipe(source),
        "Before and after": _before_after(source),
        "Null space": _null_space(source, certificates, merged),
        "How to load it": _loading(source, merged is not None, dtype),
    }
    parts = [_header(source, merged is not None), f"# {name}", f"{what} trained with nspo-lightning: safety GRPO{how}."]
    if warning is not None:
        parts.append(f"> **Warning.** {warning}")
    return "\n\n".join([*parts, *(f"## {title}\n\n{body}" for title, body in sections.items())]) + "\n"


def _header(source: ExportSource, merged: bool) -> str:
    header: dict[str, Any] = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    base = source.settings.path
    if base != TOY and not Path(base).expanduser().exists():  # the hub takes ids only
        header |= {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
    header["tags"] = ["nspo-lightning", "grpo", "safety"] + ([] if merged else ["lora"])
    return f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---"


def _base(source: ExportSource, merged: bool) -> str:
    settings = source.settings
    shown = "the policy embedded in nspo-lightning (`toy`)" if settings.path == TOY else f"`{settings.path}`"
    lines = [f"{shown}{f', revision {settings.revision}' if settings.revision else ''}."]
    if gguf := gguf_identity(settings):
        lines.append(
            f"That is the GGUF file `{gguf['gguf']}` (SHA-256 `{gguf['gguf_sha256']}`), unpacked into plain weights."
        )
    if settings.merged is not None:
        lines.append(f"The adapter `{settings.merged}` was merged into it before this training.")
    if settings.warm_start is not None:
        lines.append(f"Training went on from the adapter `{settings.warm_start}`, which is part of this update.")
    if settings.chat_template is not None or settings.chat_template_kwargs:
        lines.append(
            "Prompts were rendered with the chat template of the tokenizer in this folder, not the base's own."
        )
    if settings.quantization != "none":
        lines.append(f"Trained on it in {settings.quantization} ({settings.dtype} arithmetic).")
        if merged:
            lines.append(
                "What is merged here is the unquantised base: its outputs differ from those of the quantised one, "
                "which the figures below were measured on."
            )
    return " ".join(lines)


def _recipe(source: ExportSource) -> str:
    model = dict(source.config.get("model") or {})
    reward = model.get("reward")
    recipe = {key: model[key] for key in RECIPE_FIELDS if model.get(key) is not None}
    policy = model.get("policy") or {}
    recipe["policy"] = {key: policy[key] for key in POLICY_FIELDS if policy.get(key) not in (None, {})}
    names = reward if isinstance(reward, list) else [reward]
    recipe["reward"] = [entry["class_path"] for entry in names if isinstance(entry, Mapping) and "class_path" in entry]
    recipe["batch_size"] = (source.config.get("data") or {}).get("batch_size")
    counts = f"{counted(source.updates, 'optimizer step')}, checkpoint `{source.checkpoint.name}`"
    return f"{counts}.\n\n{_yaml(recipe, tuple(recipe))}"


def _before_after(source: ExportSource) -> str:
    after = {key.removeprefix("after/"): v for key, v in source.summary.items() if key.startswith("after/")}
    if not after:
        return "Not measured by the run."
    before = {key: source.summary.get(f"before/{key}") for key in after}
    rows = [(key, _percent(before[key]), _percent(value)) for key, value in after.items()]
    lines = [markdown_table(["held-out prompts", "before", "after"], rows, align="lrr")]
    measured = source.summary.get("checkpoint")
    if measured is not None and measured != source.checkpoint.name:
        lines += ["", f"Measured on {measured}; this is an export of {source.checkpoint.name}."]
    elif measured is None and source.summary.get("updates") != source.updates:
        lines += ["", f"Measured at the end of the run; this is an export of {source.checkpoint.name}."]
    return "\n".join(lines)


def _null_space(source: ExportSource, certificates: Sequence[LayerCertificate], merged: Sequence[str] | None) -> str:
    lines: list[str] = []
    if certificates:
        lines.append(
            f"Certificate of the adapter against its basis, in float64: {counted(len(certificates), 'layer')}, "
            f"{leak_sentence(certificates)}; bound on a layer's relative output change on general text: at most "
            f"{max(c.output_change for c in certificates):.2g}."
        )
        rows = [
            (_short(c.name), f"{c.leak:.2g}", f"{c.update_norm:.3g}", f"{c.protected} / {c.null_dims}")
            for c in sorted(certificates, key=lambda c: -c.leak)[:WORST]
        ]
        columns = ["layer", "leak", "norm of the update", "protected / free directions"]
        lines.append(markdown_table(columns, rows, align="lrrr"))
    elif merged is None:
        lines.append(no_basis_sentence(source))
    if merged is not None:
        lines.append("\n".join(merged))
    if source.projection is not None:
        lines.append("Fingerprint of the calibration (model, text, settings):")
        lines.append(_yaml(source.projection, ("fingerprint",)))
    return "\n\n".join(lines)


def _loading(source: ExportSource, merged: bool, dtype: str) -> str:
    gguf = gguf_identity(source.settings)
    base = loadable_folder(source.settings) if gguf else source.settings.path
    where = "str(TOY_PATH)" if base == TOY else repr(base)
    toy = "from nspo_lightning.policy import TOY_PATH\n" if base == TOY else ""
    served = "$(python -c 'from nspo_lightning.policy import TOY_PATH; print(TOY_PATH)')" if base == TOY else base
    if merged:
        return (
            "transformers:\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="{dtype}")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n\n'
            f"vLLM:\n\n```bash\nvllm serve THIS_FOLDER --dtype {dtype}\n```"
        )
    rank = source.settings.lora.r if source.settings.lora is not None else 0
    ranks = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
    note = (
        f"The adapter was trained on the base in {source.settings.quantization}: pass the same `quantization_config` "
        "(bitsandbytes) for the outputs that were measured.\n\n"
        if source.settings.quantization != "none"
        else ""
    )
    note += _from_gguf(gguf["gguf"], base) if gguf else ""
    return (
        f"{note}PEFT:\n\n```python\n{toy}from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({where})\n"
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n\n'
        "transformers (with peft installed):\n\n```python\n"
        f"{toy}from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({where})\n"
        'model.load_adapter("THIS_FOLDER")\n```\n\n'
        f"vLLM:\n\n```bash\nvllm serve {served} --enable-lora --max-lora-rank {ranks} \\\n"
        "  --lora-modules safe=THIS_FOLDER\n```"
    )


def _from_gguf(name: str, folder: str) -> str:
    """Say how a user of a GGUF file gets at what the adapter goes on, and back to GGUF."""
    making = f"from nspo_lightning.policy.gguf import model_folder; print(model_folder('{name}'))"
    return (
        f"PEFT, transformers and vLLM load a folder, not a GGUF file. `{name}` was unpacked into `{folder}`, which "
        "adapter_config.json names too; elsewhere make it anew from the same file, and take the path that this "
        f'prints:\n\n```bash\npython -c "{making}"\n```\n\n'
        f"llama.cpp, Ollama, LM Studio: `convert_lora_to_gguf.py --base FOLDER THIS_FOLDER` of llama.cpp makes a GGUF "
        f"adapter to load beside `{name}` (`--lora`); or make a whole model with `export --merge` and its "
        "`convert_hf_to_gguf.py`.\n\n"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _yaml(values: Any, keys: Sequence[str]) -> str:
    chosen = {key: values[key] for key in keys if isinstance(values, Mapping) and values.get(key) is not None}
    if not chosen:
        return "Not known."
    return f"```yaml\n{yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).strip()}\n```"


def _short(name: str) -> str:
    return name.removeprefix(PREFIX).removeprefix(MODEL_PREFIX)
