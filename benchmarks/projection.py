"""What the null space costs: thin against dense projection, share of a step, the basis, calibration.

    python benchmarks/projection.py [--parts thin,step,calibration,basis]

One run, ratios as a table, JSON in ``results/projection.json`` with the versions and the machine. ``step`` times a
forward and backward pass of 16 x 128 tokens of a 27 M-parameter model, the least that a GRPO update contains (sampling
comes on top), against the two projections of that update.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nspo_lightning.nullspace import (
    BasisSettings,
    ForwardCall,
    Spectrum,
    calibrate_modules,
    choose_rank,
    decompose,
    plan_layers,
)
from nspo_lightning.nullspace.basis import build_basis
from nspo_lightning.nullspace.keeper import NullSpaceKeeper
from nspo_lightning.nullspace.projection import apply


def best(function: Callable[[], Any], repeats: int) -> float:
    """Return the shortest time of several calls, in seconds, after one call to warm up.

    With one thread it is CPU time, which other processes on the machine disturb least; else wall time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    times = []
    for _ in range(repeats):
        begin = clock()
        function()
        times.append(clock() - begin)
    return min(times)


def thin() -> dict[str, float]:
    """Keep a rank-16 adapter of Qwen2.5-7B's gate_proj in place, against the dense form (W - W_ref) P."""
    width, out, protected, rank = 3584, 18944, 1024, 16
    vectors = torch.linalg.qr(torch.randn(width, protected)).Q
    values = torch.linspace(2, 1, width, dtype=torch.float64)
    spectrum = Spectrum(values=values, vectors=torch.cat([vectors, torch.zeros(width, width - protected)], 1), tokens=1)
    basis = build_basis(spectrum, choose_rank(values, "rank", protected))
    adapter = torch.randn(rank, width)
    ours = best(lambda: apply(basis, adapter), 20)
    weight, reference, projector = (
        torch.randn(out, width),
        torch.randn(out, width),
        torch.eye(width) - vectors @ vectors.T,
    )
    dense = best(lambda: reference + (weight - reference) @ projector, 1)
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

    whole = best(update, 3)
    gradients, parameters = best(keeper.project_gradients_, 10), best(keeper.reproject_, 10)
    projections = gradients + parameters
    return {
        "forward_backward_s": whole,
        "project_gradients_s": gradients,
        "reproject_s": parameters,
        "share_of_forward_backward": projections / whole,
        "matrices": float(len(layers)),
        "packs": float(len(keeper._packs)),
    }


def calibration() -> dict[str, float]:
    """The collecting passes over their own forward passes, at hidden 512 (eigenvectors apart)."""
    from nspo_lightning.nullspace.collect import InputCollector

    model = model_27m().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    modules = {layer.name: layer.module for layer in plan_layers(model).layers}
    batches = [torch.randint(0, 1000, (16, 128)) for _ in range(4)]

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

    plain, collecting = best(forward, 2), best(collect, 2)
    return {"forward_s": plain, "collecting_s": collecting, "ratio": collecting / plain}


def basis() -> dict[str, float]:
    """The basis of a 3,584-wide Gram against torch.svd of it, and the distance of the protected subspaces."""
    width, protected = 3584, 1024
    mixing = torch.cat([torch.logspace(1, 0, protected), torch.logspace(-2, -3, width - protected)])
    rows = torch.randn(2 * width, width) * mixing
    moment = rows.double().T @ rows.double() / rows.shape[0]
    begin = time.perf_counter()
    ours = decompose(moment, tokens=rows.shape[0])
    middle = time.perf_counter()
    theirs = torch.svd(moment.float())[0]
    end = time.perf_counter()
    a, b = ours.vectors[:, :protected], theirs[:, :protected].double()
    return {
        "eigh_float64_s": middle - begin,
        "svd_float32_s": end - middle,
        "times_faster": (end - middle) / (middle - begin),
        "subspace_distance": float((a - b @ (b.T @ a)).norm(dim=0).max()),
    }


PARTS = {"thin": thin, "step": step, "calibration": calibration, "basis": basis}


def main() -> None:
    """Run the parts, print a table and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "projection.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": arguments.threads,
        "clock": "cpu time" if arguments.threads == 1 else "wall time",
    }
    for name in arguments.parts.split(","):
        result[name] = PARTS[name]()
        print(name, {key: float(f"{value:.4g}") for key, value in result[name].items()}, flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
