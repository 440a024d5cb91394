"""The table of goals from the JSON files of run.sh: what was measured, on what, and what was not.

    python benchmarks/gpu/goals.py [OUT]     # benchmarks/results/gpu by default

Knows the standard library alone, so that it runs where nothing is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
NOTHING = "not measured"
SMALL = "quantized+checkpointing"  # the step that has to fit; it is measured under a limit
GOALS = {"sampling": 8.0, "roofline": 0.6, "step": 4.0, "projection": 0.01, "calibration": 1.3}

Parts = Mapping[str, Mapping[str, Any]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the parts' files by part."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return {content["part"]: content for content in found if "part" in content}


def measured(parts: Parts, kind: str) -> dict[str, dict[str, Any]]:
    """Return what was measured of a kind, by name: errors and what was skipped left out."""
    found: dict[str, dict[str, Any]] = {}
    for part in (f"{kind}-rest", f"{kind}-first", kind):
        for name, values in parts.get(part, {}).get("results", {}).items():
            if not {"error", "skipped"} & values.keys():
                found[name] = values
    return found


def best(results: Mapping[str, Mapping[str, Any]], key: str, *, least: bool = False) -> str | None:
    """Name the result with the largest value (the least); None without any."""
    named = [name for name, values in results.items() if values.get(key) is not None]
    return (min if least else max)(named, key=lambda name: results[name][key]) if named else None


def rows(parts: Parts) -> list[tuple[str, str, str, str, str]]:
    """Return figure, anchor, goal, what was found, and whether the goal is reached."""
    sampling, ours, trl = measured(parts, "sampling"), measured(parts, "step"), measured(parts, "trl")
    found = [
        _sampling(sampling, trl),
        _roofline(sampling),
        _step(ours, trl),
        _memory(parts),
        _projection(ours),
        _calibration(measured(parts, "calibration")),
    ]
    kinds = {(part["scale"], part["device"]["kind"]) for part in parts.values() if "device" in part}
    judged = kinds <= {("full", "cuda")}  # goals are for a card and the full size
    return [row if judged else (*row[:4], "-") for row in found]


def _row(figure: str, anchor: str, goal: str, found: str = NOTHING, reached: bool | None = None) -> Any:
    return figure, anchor, goal, found, "-" if reached is None else "yes" if reached else "no"


def _sampling(sampling: Mapping[str, Any], trl: Mapping[str, Any]) -> Any:
    head = ("sampling, tokens/s", "TRL with HF generate, its fastest", f">= {GOALS['sampling']:g}x")
    fast, theirs = best(sampling, "tokens_a_second"), best(trl, "sampling_tokens_a_second")
    if fast is None:
        return _row(*head)
    speed = sampling[fast]["tokens_a_second"]
    if theirs is None:
        return _row(*head, f"{speed:,.0f} ({fast}); TRL {NOTHING}")
    other = trl[theirs]["sampling_tokens_a_second"]
    found = f"{speed / other:.1f}x: {speed:,.0f} ({fast}) against {other:,.0f} ({theirs})"
    return _row(*head, found, speed / other >= GOALS["sampling"])


def _roofline(sampling: Mapping[str, Any]) -> Any:
    head = ("sampling, share of the memory's speed", "all weights once a step in bf16", f"{GOALS['roofline']:.0%}")
    name = best(sampling, "share_of_bf16_roofline")
    if name is None:
        return _row(*head)
    share = sampling[name]["share_of_bf16_roofline"]
    return _row(*head, f"{share:.1%} ({name})", share >= GOALS["roofline"])


def _step(ours: Mapping[str, Any], trl: Mapping[str, Any]) -> Any:
    head = ("whole GRPO step", "TRL, its fastest", f">= {GOALS['step']:g}x at no more memory")
    mine, theirs = best(ours, "seconds_a_step", least=True), best(trl, "seconds_a_step", least=True)
    if mine is None:
        return _row(*head)
    a = ours[mine]
    if theirs is None:
        return _row(*head, f"{a['seconds_a_step']:.2f} s, {a['peak_gb']:.1f} GB ({mine}); TRL {NOTHING}")
    b = trl[theirs]
    # Ours that is fastest at no more memory than theirs; where none is, the fastest, and the goal is missed.
    small = {name: values for name, values in ours.items() if values["peak_gb"] <= b["peak_gb"]}
    mine = best(small, "seconds_a_step", least=True) or mine
    a = ours[mine]
    faster = b["seconds_a_step"] / a["seconds_a_step"]
    found = (
        f"{faster:.1f}x: {a['seconds_a_step']:.2f} s, {a['peak_gb']:.1f} GB ({mine}) against "
        f"{b['seconds_a_step']:.2f} s, {b['peak_gb']:.1f} GB ({theirs})"
    )
    return _row(*head, found, faster >= GOALS["step"] and bool(small))


def _memory(parts: Parts) -> Any:
    head = ("peak memory of a step, `quantized`", "24 GB card", "fits")
    tried: dict[str, Any] = {}
    for part in ("step-first", "step-rest"):
        tried |= {k: v for k, v in parts.get(part, {}).get("results", {}).items() if k == SMALL and "skipped" not in v}
    if SMALL not in tried:
        return _row(*head)
    values = tried[SMALL]
    if "error" in values:
        return _row(*head, values["error"].splitlines()[0][:120], False)
    found = f"{values['peak_gb']:.1f} GB in tensors, {values['reserved_gb']:.1f} GB reserved"
    limit = values.get("memory_limit_gb")
    return _row(*head, f"{found}, limited to {limit:g} GB" if limit else found, limit is not None)


def _projection(ours: Mapping[str, Any]) -> Any:
    head = ("projection's share of a step", "-", f"< {GOALS['projection']:.0%}")
    name = best(ours, "projection_share")
    if name is None:
        return _row(*head)
    share = ours[name]["projection_share"]
    return _row(*head, f"{share:.2%} ({name}; bases {ours[name]['bases']})", share < GOALS["projection"])


def _calibration(found: Mapping[str, Any]) -> Any:
    head = ("calibration, collecting", "its own forwards", f"<= {GOALS['calibration']:g}x")
    name = best(found, "ratio")
    if name is None:
        return _row(*head)
    values = found[name]
    bases = values.get("bases_s")
    estimated = values.get("bases_estimated_s")
    text = f"{bases:.0f} s" if bases is not None else NOTHING
    if bases is None and estimated is not None:
        text = f"about {estimated:.0f} s by {values['bases']} of them"
    found_text = f"{values['ratio']:.2f}x on {values['texts']} texts, {values['forward_s']:.1f} s; bases {text}"
    return _row(*head, found_text, values["ratio"] <= GOALS["calibration"])


def about(parts: Parts) -> Iterable[str]:
    """Say what was measured on what, and what did not go well."""
    told = {
        (part["device"].get("name", part["device"]["kind"]), part["scale"], part["commit"])
        for part in parts.values()
        if "device" in part
    }
    for device, scale, commit in sorted(told):
        yield f"Device: {device}; scale: {scale}; commit {commit}."
    for name, part in parts.items():
        if part["status"] != "done":
            why = str(part.get("reason") or part.get("error") or "").strip().splitlines()
            yield f"{name}: {part['status']}{': ' + why[-1][:200] if why else ''}"
        for result, values in part["results"].items():
            if problem := values.get("error") or values.get("skipped"):
                yield f"{name}, {result}: {problem.splitlines()[0][:200]}"


def table(parts: Parts) -> str:
    """Return the table, as Markdown."""
    lines = ["| figure | anchor | goal | found | reached |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(parts))])


def main() -> None:
    """Print the table, and what it is about."""
    parts = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    print(table(parts))
    print(*about(parts), sep="\n")


if __name__ == "__main__":
    main()
