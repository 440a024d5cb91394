"""The tables of docs/scaling.md from benchmarks/results/scaling.json and the formula; see scaling.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import scaling_formula as formula
from scaling_formula import MODELS, Activations, Load, Shape

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
LOAD = Load()
PROTECTED = ("1,024 directions", "a tenth", "half")
"""What of each input is protected, or, where more is protected than not, what is left free."""
PEAK_FLOPS, USED = 989e12, 0.4  # an H100's dense bfloat16 products, and the share that training usually reaches
BANDWIDTH, READ = 3.35e12, 0.6  # its memory's bytes a second, likewise


def write_tables(result: dict[str, Any]) -> None:
    """Fill in the page."""
    kept = Activations(**result["activations"])
    text = PAGE.read_text()
    for name, table in (
        ("terms", terms_table(result["terms"])),
        ("memory", memory_table(kept, result["logit_copies"])),
        ("bases", bases_table()),
        ("work", work_table()),
    ):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{PAGE} has no place for '{name}': expected the two comments around it.")
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    PAGE.write_text(text)


def terms_table(terms: list[dict[str, Any]]) -> str:
    """Compare formula and measurement."""
    lines = ["| term | formula | measured | deviation |", "|---|---|---|---|"]
    for line in terms:
        numbers = [f"{line[key]:,.2f}" if line["unit"] == "copies" else f"{line[key]:,.0f}" for key in _SIDES]
        lines.append(f"| {line['term']} ({line['unit']}) | {numbers[0]} | {numbers[1]} | {line['deviation']:+.1%} |")
    return "\n".join(lines)


_SIDES = ("predicted", "measured")


def memory_rows(shape: Shape, kept: Activations, copies: float) -> dict[str, float]:
    """Bytes of each term, and what they add up to in training, in sampling and in calibration."""
    base, adapter = formula.base_bytes(shape), formula.lora_bytes(shape, LOAD.rank)
    training = {
        "activations of a micro-batch, checkpointed": formula.activation_bytes(shape, LOAD, kept),
        "largest matrix in 16 bit": formula.dequantised_bytes(shape),
        "chunk of logits": formula.logits_bytes(shape, copies=copies),
    }
    cache = formula.cache_bytes(shape, LOAD)
    bases = protected_bytes(shape, PROTECTED[0])
    copied = formula.sampling_copy_bytes(shape, "merged")
    return {
        "base in NF4, embeddings and head in 16 bit": base,
        "adapter, gradients, Adam (rank 16, float32)": adapter,
        "bases, 1,024 directions protected": bases,
        **training,
        "keys and values while sampling": cache,
        "copy of the linear maps while sampling (`dequantized`, `merged`)": copied,
        "**training**": base + adapter + bases + sum(training.values()),
        "**sampling**, `quantized`": base + adapter + bases + cache,
        "**sampling** from a copy": base + adapter + bases + cache + copied,
        "second moments, all layers at once (from the code, not measured)": formula.grams_bytes(shape, LOAD.domains),
        "largest layer's second moment and its decomposition (likewise)": max(
            width * width * (8.0 if width <= 8192 else 4.0) + width * width * 32.0 for width in shape.inputs
        ),
    }


def memory_table(kept: Activations, copies: float) -> str:
    """GB a term and model, on each device."""
    rows = [memory_rows(shape, kept, copies) for shape in MODELS]
    lines = ["| GB a device | " + " | ".join(shape.name for shape in MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[name] / 1e9:.1f}" for row in rows) + " |" for name in rows[0]]
    return "\n".join(lines)


def protected_bytes(shape: Shape, protected: str) -> float:
    """Bytes of the bases where so much of each input is protected."""
    share = {"a tenth": 0.1, "half": 0.5}.get(protected)
    if share is not None:
        return formula.basis_bytes(shape, share)
    return shape.layers * sum(4.0 * width * 1024 for width in shape.inputs)


def bases_table() -> str:
    """GB of the bases, with and without those of the MLP's wide input."""
    lines = ["| protected, or free | " + " | ".join(shape.name for shape in MODELS) + " |"]
    lines.append("|---" * (len(MODELS) + 1) + "|")
    for protected in PROTECTED:
        cells = []
        for shape in MODELS:
            total = protected_bytes(shape, protected)
            wide = formula.basis_bytes(shape, 0.1 if protected == "a tenth" else 0.5)
            wide *= shape.intermediate**2 / sum(width**2 for width in shape.inputs)
            if protected == PROTECTED[0]:
                wide = shape.layers * 4.0 * shape.intermediate * 1024
            cells.append(f"{total / 1e9:.1f} ({(total - wide) / 1e9:.1f})")
        lines.append(f"| {protected} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def work_table() -> str:
    """FLOPs of a step by part, and seconds under the page's assumptions."""
    lines = ["| a step of 64 completions | " + " | ".join(shape.name for shape in MODELS) + " |"]
    lines.append("|---" * (len(MODELS) + 1) + "|")
    rows: dict[str, list[str]] = {}
    for shape in MODELS:
        sampling = formula.sampling_flops(shape, LOAD)
        scoring = formula.scoring_flops(shape, LOAD)
        backward = formula.backward_flops(shape, LOAD, checkpointing=True)
        total = sampling + scoring + backward

        def seconds(weights: formula.Weights, shape: Shape = shape, work: float = sampling) -> str:
            moved = LOAD.completion_tokens * formula.read_bytes(shape, LOAD.rank, weights)
            return f"{max(moved / (BANDWIDTH * READ), work / (PEAK_FLOPS * USED)):.0f}"

        for name, value in {
            "PFLOPs": f"{total / 1e15:.1f}",
            "sampling, scoring, backward with recomputation": " / ".join(
                f"{part / total:.0%}" for part in (sampling, scoring, backward)
            ),
            "sampling, s, `quantized`": seconds("quantized"),
            "sampling, s, from a copy": seconds("merged"),
            "scoring and backward, s": f"{(scoring + backward) / (PEAK_FLOPS * USED):.0f}",
        }.items():
            rows.setdefault(name, []).append(value)
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)
