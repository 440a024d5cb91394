"""Tables and a plot for docs/performance.md from benchmarks/results/grpo_step.json; see grpo_step.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REAL = "real"
"""Names of the cases of a model that was given begin so."""


def work(case: dict[str, Any]) -> dict[str, float] | None:
    """Count the floating-point operations of a step by formula, for both sides; None where lengths are random.

    Products of the policy of grpo_step.py alone (attention's without what a mask may save). A frozen weight costs two a
    parameter and token forward, two backward; an adapter's two and four; the head is not differentiated to its weights.
    """
    if case["stop_tokens"] > 1 or case["num_iterations"] > 1:
        return None
    prompt, new, prompts, group = case["prompt_tokens"], case["max_new_tokens"], 4, 8
    base = 8 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408)
    adapter = 8 * 16 * (2 * (512 + 512) + 2 * (512 + 128) + 3 * (512 + 1408))
    head, looked_at = 512 * 8192, 4 * 512 * 8  # a parameter; a token and key
    rows = prompts * group
    decoded = rows * (new - 1) * (2 * (base + adapter + head) + looked_at * (prompt + new / 2))

    def step(prefilled: int, trained: int, keys: float) -> float:
        prefill = prefilled * (2 * (base + adapter) + looked_at * prompt)
        return prefill + decoded + trained * (4 * base + 6 * adapter) + 4 * rows * new * head + 3 * looked_at * keys

    whole = rows * (prompt + new)
    shared = prompts * prompt + rows * (new - 1)
    return {
        "trl": step(rows * prompt, whole, whole * (prompt + new)),
        "ours": step(prompts * prompt, shared, prompts * prompt * prompt + rows * (new - 1) * (prompt + new)),
    }


def cases_table(results: dict[str, Any]) -> str:
    """Compare the two sides, case by case."""
    lines = [
        "| case | TRL s/step (CPU s) | ours s/step (CPU s) | times faster (goal) | times fewer FLOPs | TRL peak GB "
        "| ours | share (goal) | load before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in sorted(results["cases"].items()):
        if name.startswith(REAL):
            continue
        trl, ours = case["trl"], case["ours"]
        goal = "-" if case["memory"] is None else case["memory"]
        flops = work(case)
        fewer = "-" if flops is None else f"{flops['trl'] / flops['ours']:.2f}"
        lines.append(
            f"| {name}: {case['title']} | {trl['seconds_per_step']:.1f} ({trl['cpu_seconds_per_step']:.1f}) "
            f"| {ours['seconds_per_step']:.1f} ({ours['cpu_seconds_per_step']:.1f}) "
            f"| **{case['times_faster']:.2f}** ({case['faster']}) | {fewer} | {trl['peak_gb']:.2f} "
            f"| {ours['peak_gb']:.2f} | {case['memory_share']:.2f} ({goal}) | {case['load_before']:.1f} |"
        )
    return "\n".join(lines)


def real_table(results: dict[str, Any]) -> str:
    """Compare the two sides on a real model, with the seconds of our step by phase; one case has no peer."""
    lines = [
        "| | TRL s/step | ours s/step | sample, score, backward, projection | times faster | TRL peak GB | ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in sorted(results["cases"].items()):
        if not name.startswith(REAL):
            continue
        ours, trl = case["ours"], case.get("trl")
        phases = ours["runs"][0]["phases"]
        spent = ", ".join(f"{phases[phase]:.2f}" for phase in ("sample", "score", "backward", "projection"))
        faster, theirs, peak = ("", "", "")
        if trl is not None:
            faster, theirs = f"**{case['times_faster']:.2f}**", f"{trl['seconds_per_step']:.1f}"
            peak = f"{trl['peak_gb']:.2f}"
        lines.append(
            f"| {case['title']} | {theirs} | {ours['seconds_per_step']:.1f} | {spent} | {faster} | {peak} "
            f"| {ours['peak_gb']:.2f} |"
        )
    return "\n".join(lines)


def scaling_table(curves: dict[str, Any]) -> str:
    """List the curves, with the cost of a token that should stay level."""
    plain = {row["group"]: row["seconds"] for row in curves["group_plain"]}
    lines = [
        "| varied | G | P | C | tokens G C + P | tokens G (P + C) | sampling s | forward + backward s "
        "| train ms a token | plain path s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("group", "prompt", "completion"):
        for row in curves[name]:
            other = f"{plain[row['group']]:.2f}" if name == "group" and row["group"] in plain else ""
            lines.append(
                f"| {name} | {row['group']} | {row['prompt']} | {row['completion']} | {row['tokens_shared']} "
                f"| {row['tokens_plain']} | {row['sample_seconds']:.2f} | {row['train_seconds']:.2f} "
                f"| {1e3 * row['train_seconds'] / row['tokens_shared']:.2f} | {other} |"
            )
    return "\n".join(lines)


def profile_table(profile: dict[str, Any]) -> str:
    """Show what each part of a step computes, and what it takes against its products alone."""
    lines = [
        "| part | GFLOP: base, adapter, attention | seconds | its products alone: base, adapter, attention | Python "
        "and dispatch | GFLOP/s | of the best matmul |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = ("base", "adapter", "attention")
    parts = {name: profile["parts"][name] for name in ("prefill", "decode", "score", "backward")}
    parts["whole step"] = {
        key: {kind: sum(p[key][kind] for p in profile["parts"].values()) for kind in kinds}
        for key in ("flops", "products")
    } | {key: sum(p[key] for p in profile["parts"].values()) for key in ("seconds", "dispatch")}
    for name, part in parts.items():
        flops, alone = ([part[key][kind] for kind in kinds] for key in ("flops", "products"))
        rate = sum(flops) / part["seconds"]
        lines.append(
            f"| {name} | {sum(flops) / 1e9:.0f}: {', '.join(f'{x / 1e9:.1f}' for x in flops)} | {part['seconds']:.2f} "
            f"| {sum(alone):.2f}: {', '.join(f'{x:.2f}' for x in alone)} | {part['dispatch']:.2f} "
            f"| {rate / 1e9:.0f} | {rate / profile['best_flops_per_second']:.0%} |"
        )
    return "\n".join(lines)


def plot(curves: dict[str, Any], path: Path) -> None:
    """Draw cost over each length, with the two token counts to compare shapes with."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, name in zip(axes, ("group", "prompt", "completion"), strict=True):
        rows = curves[name]
        x = [row[name] for row in rows]
        axis.plot(x, [row["seconds"] for row in rows], "o-", label="step, shared prompts")
        per_token = rows[-1]["seconds"] / rows[-1]["tokens_shared"]
        axis.plot(x, [row["tokens_shared"] * per_token for row in rows], ":", color="grey", label="~ G C + P")
        if name == "group":
            plain = curves["group_plain"]
            axis.plot([r["group"] for r in plain], [r["seconds"] for r in plain], "s--", label="step, plain path")
        axis.set_xlabel({"group": "G", "prompt": "prompt tokens P", "completion": "completion tokens C"}[name])
        axis.set_ylabel("CPU seconds, one thread")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_docs(results: dict[str, Any], folder: Path) -> None:
    """Put the tables between their markers."""
    page = folder / "performance.md"
    text = page.read_text()
    parts = {"cases": cases_table(results), "real": real_table(results)} if results.get("cases") else {}
    if "scaling" in results:
        parts["scaling"] = scaling_table(results["scaling"])
        plot(results["scaling"], folder / "performance_scaling.svg")
    if "profile" in results:
        parts["profile"] = profile_table(results["profile"])
    for name, table in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    page.write_text(text)
