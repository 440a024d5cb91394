"""What the null space costs: thin against dense projection, shares of a step, the basis, calibration, the sketch.

    python benchmarks/projection.py [--parts thin,step,run,calibration,basis,sketch,plan,solvers]

Ratios as a table, JSON in ``results/projection.json`` with the versions and the machine; parts that are not run keep
the numbers that are there. ``step`` times a forward and backward pass of 16 x 128 tokens of a 27 M-parameter model, the
least that an update contains, against the two projections of that update; ``run`` times them inside real GRPO fits.
Spectra are stated where they are made; the second one of ``basis`` has no gap, as those of real models.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning.nullspace import BasisSettings, ForwardCall, Spectrum, calibrate_modules, choose_rank, plan_layers
from nspo_lightning.nullspace.basis import build_basis
from nspo_lightning.nullspace.basis_builder import decompose_for
from nspo_lightning.nullspace.budget import peak_bytes, plan_passes, sketch_columns
from nspo_lightning.nullspace.keeper import NullSpaceKeeper
from nspo_lightning.nullspace.projection import apply


def median(function: Callable[[], Any], repeats: int) -> float:
    """Return the median time of several calls, in seconds, after one call to warm up.

    With one thread it is CPU time, which other processes on the machine disturb least; else wall time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    times = []
    for _ in range(repeats):
        begin = clock()
        function()
        times.append(clock() - begin)
    return statistics.median(times)


def once(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of one call, by the clock of `median`, and its result."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    result = function()
    return clock() - begin, result


def thin() -> dict[str, float]:
    """Keep a rank-16 adapter of Qwen2.5-7B's gate_proj in place, against the dense form (W - W_ref) P."""
    width, out, protected, rank = 3584, 18944, 1024, 16
    vectors = torch.linalg.qr(torch.randn(width, protected)).Q
    values = torch.linspace(2, 1, width, dtype=torch.float64)
    spectrum = Spectrum(values=values, vectors=torch.cat([vectors, torch.zeros(width, width - protected)], 1), tokens=1)
    basis = build_basis(spectrum, choose_rank(values, "rank", protected))
    adapter = torch.randn(rank, width)
    weight, reference = torch.randn(out, width), torch.randn(out, width)
    projector = torch.eye(width) - vectors @ vectors.T
    dense = median(lambda: reference + (weight - reference) @ projector, 5)
    ours = median(lambda: apply(basis, adapter), 50)
    return {
        "thin_s": ours,
        "dense_s": dense,
        "times_faster": dense / ours,
        "thin_bytes": 4.0 * basis.vectors.numel(),
        "dense_bytes": 4.0 * (projector.numel() + reference.numel()),
        "bytes_ratio": (projector.numel() + reference.numel()) / basis.vectors.numel(),
    }


def model_27m(vocabulary: int = 1000) -> Any:
    """Return a Llama of hidden size 512 with 8 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=vocabulary
    )
    return LlamaForCausalLM(config)


def step() -> dict[str, float]:
    """Both projections of an update, against one forward and backward pass."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_27m(), LoraConfig(r=16, target_modules="all-linear"))
    layers, ids = plan_layers(model).layers, torch.randint(0, 1000, (16, 128))
    calls = [ForwardCall(kwargs={"input_ids": torch.randint(0, 1000, (16, 128))}) for _ in range(2)]
    found = calibrate_modules(
        {layer.name: layer.module for layer in layers}, model, lambda: iter(calls), BasisSettings(criterion="rank")
    )
    keeper = NullSpaceKeeper(layers, [found.basis_of(layer.name) for layer in layers])

    def update() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    whole = median(update, 3)
    gradients, parameters = median(keeper.project_gradients_, 10), median(keeper.reproject_, 10)
    projections = gradients + parameters
    return {
        "forward_backward_s": whole,
        "project_gradients_s": gradients,
        "reproject_s": parameters,
        "share_of_forward_backward": projections / whole,
        "matrices": float(len(layers)),
        "packs": float(len(keeper._packs)),
    }


def run() -> dict[str, Any]:
    """Both projections inside real GRPO fits."""
    from projection_run import run_27m, run_quickstart

    return {"quickstart": run_quickstart(), "27m": run_27m(model_27m())}


def calibration() -> dict[str, Any]:
    """The collecting passes over their own forward passes, at hidden 512 (eigenvectors apart), 12,288 tokens each."""
    return {
        "128_tokens": collecting(model_27m(), (16, 128)),
        "512_tokens": collecting(model_27m(), (4, 512)),
        "128_tokens_32000_words": collecting(model_27m(32_000), (16, 128)),
    }


def collecting(model: Any, shape: tuple[int, int], tokens: int = 12_288) -> dict[str, float]:
    """Time forward passes alone, and with the collector; and the products that the sums need at the least."""
    from nspo_lightning.nullspace.collect import InputCollector

    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    modules = {layer.name: layer.module for layer in plan_layers(model).layers}
    batches = [torch.randint(0, 1000, shape) for _ in range(tokens // (shape[0] * shape[1]))]

    @torch.no_grad()
    def forward() -> None:
        for ids in batches:
            model(input_ids=ids)

    @torch.no_grad()
    def collect() -> None:
        with InputCollector(modules) as collector:
            for ids in batches:
                collector.begin()
                model(input_ids=ids)
                collector.end()

    forward()
    pairs = [(once(forward)[0], once(collect)[0]) for _ in range(3)]  # in turn, so that both see the same machine
    plain, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    rows = torch.randn(shape[0] * shape[1], 1376)
    inputs = model.config.num_hidden_layers * len(batches)
    product = median(lambda: rows.T @ rows, 5) / 2
    narrow = rows[:, :512].contiguous()
    least = inputs * (product + 3 * median(lambda: narrow.T @ narrow, 5) / 2)
    return {
        "forward_s": plain,
        "collecting_s": whole,
        "ratio": whole / plain,
        "half_of_the_full_products_s": least,  # what a symmetric product costs at a full one's speed, nothing else
        "least_ratio": 1 + least / plain,
    }


def basis() -> dict[str, Any]:
    """The basis of a 3,584-wide Gram against torch.svd of it, and the distance of the protected subspaces."""
    width, protected = 3584, 1024
    gap = torch.cat([torch.logspace(2, 0, protected), torch.logspace(-4, -6, width - protected)]).double()
    massive = torch.cat([torch.tensor([50.0, 10.0, 5.0]), 0.01 / torch.arange(1, width - 2)]).double()
    return {
        # 1,024 eigenvalues from 100 to 1, the others from 1e-4 to 1e-6, evenly on a logarithmic scale.
        "gap": against_svd(gap, {"rank 1024": ("rank", 1024), "energy 1e-3": ("energy", 1e-3)}),
        # 50, 10, 5 and 0.01 / i: massive leading values and a long tail without a gap.
        "massive": against_svd(
            massive, {"rank 1024": ("rank", 1024), "energy 1e-3": ("energy", 1e-3), "auto": ("auto", None)}
        ),
    }


def solvers(width: int = 1200) -> dict[str, float]:
    """What bounds a whole spectrum: eigenvalues alone, and float32 eigenvectors refined by one float64 step.

    The massive spectrum of `basis`, 28 % protected; distances as there. The step is Ogita's and Aishima's (Iterative
    refinement for symmetric eigenvalue decomposition, 2018).
    """
    massive = torch.cat([torch.tensor([50.0, 10.0, 5.0]), 0.01 / torch.arange(1, width - 2)]).double()
    exact = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()).Q
    moment, leading = (exact * massive) @ exact.T, exact[:, : int(0.28 * width)]
    moment = (moment + moment.T) / 2

    def refined() -> Tensor:
        vectors = torch.linalg.eigh(moment.float())[1].double()
        off, inner = torch.eye(width) - vectors.T @ vectors, vectors.T @ (moment @ vectors)
        values = inner.diagonal() / (1 - off.diagonal())
        apart = values - values.unsqueeze(1)
        step = torch.where(apart.abs() > 1e-9, (inner + values * off) / torch.where(apart == 0, 1.0, apart), off / 2)
        return vectors + vectors @ step

    def distance(vectors: Tensor) -> float:
        own = torch.linalg.qr(vectors[:, -leading.shape[1] :].double()).Q
        return float(torch.linalg.matrix_norm(own - leading @ (leading.T @ own), 2))

    return {
        "product_s": median(lambda: moment @ moment, 3),
        "eigenvalues_s": median(lambda: torch.linalg.eigvalsh(moment), 3),
        "eigh_s": median(lambda: torch.linalg.eigh(moment), 3),
        "eigh_float32_s": median(lambda: torch.linalg.eigh(moment.float()), 3),
        "refined_s": median(refined, 3),
        "svd_s": median(lambda: torch.svd(moment), 3),
        "eigh_distance": distance(torch.linalg.eigh(moment)[1]),
        "eigh_float32_distance": distance(torch.linalg.eigh(moment.float())[1]),
        "refined_distance": distance(refined()),
    }


def against_svd(values: Tensor, settings: dict[str, tuple[Any, float | None]]) -> dict[str, Any]:
    """Compare with torch.svd in float64 (the Gram's dtype) and float32, for several criteria.

    Subspace distances are sines of the largest angle to the eigenvectors that the Gram was made from.
    """
    width = values.numel()
    generator = torch.Generator().manual_seed(0)
    exact = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    moment = (exact * values) @ exact.T
    moment = (moment + moment.T) / 2

    def distance(vectors: Tensor, k: int) -> float:
        a, b = vectors[:, :k].double(), exact[:, :k]
        outside = a - b @ (b.T @ a)
        return float(torch.linalg.eigvalsh(outside.T @ outside)[-1].clamp_min(0).sqrt())

    double, of_double = once(lambda: torch.svd(moment)[0])
    single, of_single = once(lambda: torch.svd(moment.float())[0])
    result: dict[str, Any] = {"svd_float64_s": double, "svd_float32_s": single}
    warm = BasisSettings(criterion="rank", threshold=8)
    decompose_for(warm, moment, tokens=width, resolution=1e-15)
    for name, (criterion, threshold) in settings.items():
        asked = BasisSettings(criterion=criterion, threshold=threshold)
        find = functools.partial(decompose_for, asked, moment, tokens=width, resolution=1e-15)
        pairs = [once(find) for _ in range(3)]
        ours, spectrum = statistics.median(pair[0] for pair in pairs), pairs[0][1]
        k = choose_rank(spectrum.values, criterion, threshold).protected
        result[name] = {
            "ours_s": ours,
            "protected": float(k),
            "partial": float(spectrum.vectors.shape[1] < width),
            "times_faster": double / ours,
            "times_faster_than_float32": single / ours,
            "distance": distance(spectrum.vectors, k),
            "distance_svd_float64": distance(of_double, k),
            "distance_svd_float32": distance(of_single, k),
        }
    return result


# Work a second that `plan` takes for granted; not measured here.
FORWARD_RATE, FLOAT32_RATE, SOLVER_RATE = 300e12, 40e12, 2e12


def plan() -> dict[str, Any]:
    """Passes, memory and work of Qwen2.5-7B's calibration within 8 GB: 1,000 texts of 256 tokens, by formula."""
    inputs, tokens, linear_parameters = {"hidden": (3584, 84), "down": (18944, 28)}, 256_000, 6.5e9
    widths = {f"{name}.{i}": width for name, (width, count) in inputs.items() for i in range(count)}
    result: dict[str, Any] = {}
    for domains in (1, 3):
        passes, sketched = plan_passes(widths, domains, 8e9, "cuda")
        forward = 2 * linear_parameters * tokens
        products = tokens * sum(2 * 0.5625 * width**2 for width in widths.values())
        solving = sum(9.0 * width**3 for width in widths.values())
        result[f"{domains}_domains"] = {
            "passes": float(len(passes)),
            "sketched": float(len(sketched)),
            "peak_gb": max(peak_bytes([widths[name] for name in p], domains, "cuda") for p in passes) / 1e9,
            "forward_flops_of_a_pass": forward,
            "product_flops": products,
            "decomposition_flops": solving,
            "forward_s": len(passes) * forward / FORWARD_RATE,
            "product_s": products / FLOAT32_RATE,
            "decomposition_s": solving / SOLVER_RATE,
        }
    return result


def sketch() -> dict[str, Any]:
    """Memory of a sketch at 18,944 within 2 GB, in a fresh process; and its energy against the exact basis's."""
    child = subprocess.run(
        [sys.executable, __file__, "--memory", "--threads", str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=True,
    )
    width = 2048
    share = sketch_columns(18944, 2e9) / 18944
    power = torch.arange(1, width + 1).pow(-1.0)
    massive = torch.cat([torch.tensor([50.0, 10.0, 5.0]), 0.01 / torch.arange(1, width - 2)])
    return {
        "memory": json.loads(child.stdout),
        "power_law": against_exact(power, int(share * width)),  # 1 / i
        "massive": against_exact(massive, int(share * width)),  # 50, 10, 5 and 0.01 / i
    }


def against_exact(values: Tensor, columns: int, rows: int = 4096) -> dict[str, float]:
    """Compare protected energies at a quarter, a half and three quarters of the columns (the most that is allowed)."""
    width = values.numel()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, width, generator=generator) * values.sqrt()
    layer = nn.Linear(width, 1, bias=False)
    moment = inputs.double().T @ inputs.double() / rows
    exact = torch.linalg.eigvalsh(moment).flip(0)
    result = {"width": float(width), "columns": float(columns)}
    for part in (0.25, 0.5, 0.75):
        k, passes = int(part * columns), itertools.count()

        def calls(passes: Any = passes) -> Any:
            next(passes)
            return iter([ForwardCall(args=(inputs,))])

        settings = BasisSettings(criterion="rank", threshold=k)
        budget = (columns + 0.5) * 20 * width / 1e9
        found = calibrate_modules({"l": layer}, layer, calls, settings, memory_budget_gb=budget).bases["l"]
        u = found.vectors.double()
        ours = float((u.T @ moment @ u).trace() / moment.trace())
        result |= {
            f"protected_{k}_exact": float(exact[:k].sum() / exact.sum()),
            f"protected_{k}_missing": float(exact[:k].sum() / exact.sum()) - ours,
            f"protected_{k}_passes": float(next(passes) - 1),
        }
    return result


def memory() -> None:
    """Calibrate one input of width 18,944 within 2 GB and print the growth of the process's peak memory as JSON."""
    width = 18944
    layer = nn.Linear(width, 1, bias=False)
    torch.linalg.qr(torch.randn(64, 64))
    torch.linalg.eigh(torch.eye(64))
    inputs = torch.randn(256, width) * torch.arange(1, width + 1).pow(-0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls = [ForwardCall(args=(part,)) for part in torch.chunk(inputs, 4)]
    settings = BasisSettings(criterion="rank", threshold=1024)
    seconds, found = once(
        lambda: calibrate_modules({"l": layer}, layer, lambda: iter(calls), settings, memory_budget_gb=2.0)
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({
            "width": float(width),
            "columns": float(sketch_columns(width, 2e9)),
            "protected": float(found.bases["l"].protected),
            "peak_growth_gb": (after - before) * 1024 / 1e9,
            "imported_process_gb": before * 1024 / 1e9,
            "seconds": seconds,
        })
    )


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "thin": thin,
    "step": step,
    "run": run,
    "calibration": calibration,
    "basis": basis,
    "sketch": sketch,
    "plan": plan,
    "solvers": solvers,
}


def shown(values: dict[str, Any], indent: str = "  ") -> str:
    """Return nested numbers as indented lines."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", shown(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<28} {float(value):.4g}")
    return "\n".join(lines)


def main() -> None:
    """Run the parts, print a table and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "projection.json")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)  # the child process of `sketch`
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        memory()
        return
    earlier = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    result: dict[str, Any] = {name: earlier[name] for name in PARTS if name in earlier} | {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": arguments.threads,
        "clock": "cpu time" if arguments.threads == 1 else "wall time",
    }
    for name in arguments.parts.split(","):
        result[name] = PARTS[name]()
        print(f"{name}\n{shown(result[name])}", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
