"""A GRPO step: ours against TRL's GRPOTrainer, on the same policy, prompts, reward, optimizer and completions.

    python benchmarks/grpo_step.py                 # all five cases, TRL and ours in turn, A B A B, fresh processes
    python benchmarks/grpo_step.py --cases a,b     # some of them
    python benchmarks/grpo_step.py --model PATH    # a real model: cases real (float32), real-nf4, real-nf4-unpacking
    python benchmarks/grpo_step.py --scaling       # the cost of our step over G, prompt and completion length
    python benchmarks/grpo_step.py --profile       # where our step's time goes
    python benchmarks/grpo_step.py --docs          # write tables and plot into docs/performance.md from the JSON

Results go to benchmarks/results/grpo_step.json, merged with what is there; the last line printed is that JSON.
The policy is a random Llama (hidden 512, 8 layers, 8 heads, 2 KV heads, vocabulary 8,192: 26.7 M parameters), float32
or NF4, with LoRA r = 16 on all linear layers; 4 prompts x 8 completions a step; TRL samples with HF generate and has
loss_type grpo, beta 0, no gradient checkpointing, its defaults otherwise; ours runs GRPOModule under a Lightning
Trainer with the null-space projection on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "grpo_step.json"
PACKAGES = ["torch", "transformers", "trl", "peft", "bitsandbytes", "lightning", "accelerate"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison and what it has to reach."""

    title: str
    prompt_tokens: int
    min_new_tokens: int = 64
    max_new_tokens: int = 64
    quantization: str = "none"
    num_iterations: int = 1
    stop_tokens: int = 1  # ids that end a completion: each is about as likely as any other of the 8,192
    faster: float
    memory: float | None = None  # at most this share of TRL's peak
    prompts: int = 4
    group: int = 8
    protected: float = 0.5  # share of the directions
    training_weights: str = "auto"
    alone: bool = False  # without TRL


CASES = {
    "a": Case(title="prompt 256, 64 new tokens forced", prompt_tokens=256, faster=3.5, memory=0.5),
    "b": Case(title="prompt 64, 64 new tokens forced", prompt_tokens=64, faster=2, memory=0.6),
    "c": Case(
        title="prompt 128, lengths spread from 4 to 64 by EOS",
        prompt_tokens=128,
        min_new_tokens=3,
        stop_tokens=330,
        faster=3,
    ),
    "d": Case(title="as a, NF4 base", prompt_tokens=256, quantization="nf4", faster=3),
    "e": Case(title="as a, num_iterations 2", prompt_tokens=256, num_iterations=2, faster=3),
}
_REAL: dict[str, Any] = {
    "prompt_tokens": 64,
    "min_new_tokens": 24,
    "max_new_tokens": 24,
    "prompts": 2,
    "faster": 1,
    "protected": 0.1,
}
REAL_CASES = {
    "real": Case(title="a real model, float32", **_REAL),
    "real-nf4": Case(title="a real model, NF4", quantization="nf4", **_REAL),
    "real-nf4-unpacking": Case(
        title="the same, unpacked for each product",
        quantization="nf4",
        training_weights="quantized",
        alone=True,
        **_REAL,
    ),
}


def machine() -> dict[str, Any]:
    """Describe where the numbers come from."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}


def conditions(threads: int) -> dict[str, Any]:
    """Describe under what all that follows is measured."""
    load = os.getloadavg()[0]
    if load > 1:
        print(f"Warning: the load average is {load:.1f} before anything has started: times will be too long.")
    versions = {package: version(package) for package in PACKAGES}
    return {"machine": machine(), "threads": threads, "versions": versions, "load_before": load}


def run_worker(kind: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one side of one case in a fresh process."""
    case = {**CASES, **REAL_CASES}[name]
    steps = args.steps * case.num_iterations
    out = folder / f"{kind}.json"
    job = {**asdict(case), "folder": str(folder), "steps": steps, "warmup": case.num_iterations, "out": str(out)}
    job["model"] = str(args.model.resolve()) if name in REAL_CASES else None
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", str(HERE / "grpo_step_workers.py"), kind, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        raise RuntimeError(f"The {kind} worker of case {name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(out.read_text()))


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case in turn: A B A B."""
    case = {**CASES, **REAL_CASES}[name]
    runs: dict[str, list[dict[str, Any]]] = {"ours": []} if case.alone else {"trl": [], "ours": []}
    with tempfile.TemporaryDirectory() as tmp:
        for repeat in range(args.repeats):
            for kind in runs:
                result = run_worker(kind, name, args, Path(tmp))
                runs[kind].append(result)
                print(
                    f"  {name} {kind:4} run {repeat + 1}: {result['seconds_per_step']:.2f} s a step "
                    f"({result['cpu_seconds_per_step']:.2f} s of CPU), "
                    f"{result['tokens_per_second']:.0f} tokens a second, peak {result['peak_gb']:.2f} GB",
                    flush=True,
                )
    sides = {
        kind: {
            "seconds_per_step": statistics.median(second for r in results for second in r["step_seconds"]),
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in results),
            "cpu_seconds_per_step": statistics.median(r["cpu_seconds_per_step"] for r in results),
            "peak_gb": statistics.median(r["peak_gb"] for r in results),
            "completion_tokens_per_step": statistics.mean(r["completion_tokens_per_step"] for r in results),
            "runs": results,
        }
        for kind, results in runs.items()
    }
    if case.alone:
        return {**asdict(case), **sides}
    # Completions of random lengths differ between the two samplers, so what is compared is the time for a token.
    per_token = "tokens_per_second" if case.stop_tokens > 1 else None
    faster = (
        sides["ours"]["tokens_per_second"] / sides["trl"]["tokens_per_second"]
        if per_token
        else sides["trl"]["seconds_per_step"] / sides["ours"]["seconds_per_step"]
    )
    memory = sides["ours"]["peak_gb"] / sides["trl"]["peak_gb"]
    reached = faster >= case.faster and (case.memory is None or memory <= case.memory)
    print(
        f"{name}: {case.title}: {faster:.2f} times faster (must be {case.faster}), {memory:.2f} of the peak memory"
        f"{'' if case.memory is None else f' (must be <= {case.memory})'}: {'reached' if reached else 'MISSED'}",
        flush=True,
    )
    return {**asdict(case), **sides, "times_faster": faster, "memory_share": memory, "reached": reached}


def single(kind: str, args: argparse.Namespace) -> Any:
    """Run the scaling curves or the profile in a fresh process."""
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "out.json"
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        command = [sys.executable, "-W", "ignore", str(HERE / "grpo_step_scaling.py"), kind, str(out)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text())


def main() -> None:
    """Run what was asked for and merge it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=None, help="comma-separated, of a,b,c,d,e; default all")
    parser.add_argument("--model", type=Path, help="folder of a causal language model, for the cases real*")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of TRL, ours")
    parser.add_argument("--steps", type=int, default=2, help="measured rollouts a run, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    only = args.scaling or args.profile or args.docs
    names = args.cases.split(",") if args.cases else ([] if only else list(REAL_CASES if args.model else CASES))
    if args.model is None and (real := sorted(set(names) & set(REAL_CASES))):
        parser.error(f"case {real[0]} needs --model PATH, the folder of a causal language model")
    meta = conditions(args.threads) if names or args.scaling or args.profile else {}
    for name in names:
        results["cases"][name] = {**compare(name, args), **meta}
        save(results, args.out)
    for kind in ("scaling", "profile"):
        if getattr(args, kind):
            results[kind] = {**single(kind, args), **meta}
            save(results, args.out)
    if args.docs:
        from grpo_step_report import write_docs

        write_docs(results, HERE.parent / "docs")
    print(
        json.dumps({name: round(case.get("times_faster", 0.0), 2) for name, case in sorted(results["cases"].items())})
    )


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results after each part, so that an interrupted run loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
