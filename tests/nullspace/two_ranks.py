"""Jobs for two gloo processes; each rank writes what it found to a file that the test reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from null_space_problems import LoraLinear
from torch import nn

from nspo_lightning.nullspace import plan_layers

WIDTH, RANK = 24, 5


class Adapted(LoraLinear):
    """An adapter by shape, with the same weights on every rank."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(WIDTH, 7, RANK, bias=False)


def calls(count: int = 5) -> list[Any]:
    """Five batches of two domains: an odd number, so that one rank has more."""
    from nspo_lightning.nullspace import ForwardCall

    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(9, WIDTH, generator=generator)
    return [
        ForwardCall(args=(torch.randn(30, 9, generator=generator) @ mixing,), domains=[("a", "b")[i == 4]] * 30)
        for i in range(count)
    ]


def calibration(sharded: bool = False) -> Any:
    """Calibrate an adapter on whatever process group exists."""
    from nspo_lightning.nullspace import BasisSettings, calibrate_modules

    model, batches = Adapted(), calls()
    if sharded:
        batches = batches[dist.get_rank() :: 2]
    settings = BasisSettings(criterion="energy", threshold=1e-9)
    return calibrate_modules({"": model}, model, lambda: iter(batches), settings, keep_moments=True, sharded=sharded)


def calibrate_job(rank: int, folder: Path) -> dict[str, Any]:
    """Calibrate from one list on all ranks, and from a list that is split already."""
    found = {"whole list": calibration(), "split already": calibration(sharded=True)}
    return {
        name: {"vectors": c.bases[""].vectors, "values": c.bases[""].values, "tokens": c.domain_tokens}
        for name, c in found.items()
    }


def curvature(limit: int = 64) -> Any:
    """Measure the curvature of an adapted layer whose outputs are logits, on whatever process group exists."""
    from nspo_lightning.nullspace.curvature import measure_curvature

    model = Adapted()
    layers = plan_layers(model).layers
    batches = [{"x": call.args[0], "labels": torch.arange(30) % 7} for call in calls()]

    def loss(batch: Any) -> tuple[torch.Tensor, int]:
        logits = model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"), len(logits)

    return measure_curvature(model, layers, batches, loss, width_limit=limit)


def curvature_job(rank: int, folder: Path) -> dict[str, Any]:
    """Measure it whole, and in part; both as matrices."""
    whole, part = (curvature(limit).layers[0] for limit in (64, 6))
    return {
        name: [side.times(torch.eye(side.factor.shape[1])) for side in (of.inputs, of.outputs)]
        for name, of in {"whole": whole, "part": part}.items()
    }


def routes_job(rank: int, folder: Path) -> dict[str, Any]:
    """Calibrate on text whose batches take different routes; the bases by layer."""
    from routes import PLANS_OF_RANKS, WIDTH, Routes, calibrated, calls_of

    from nspo_lightning.nullspace.budget import peak_bytes

    torch.manual_seed(0)
    model, calls = Routes("abcd"), calls_of(PLANS_OF_RANKS)
    found = {
        "none": calibrated(model, calls),
        "one input": calibrated(model, calls, 1.05 * peak_bytes([WIDTH], 1, "cpu") / 1e9),
        "sharded": calibrated(model, calls[rank::2], 1.05 * peak_bytes([WIDTH], 1, "cpu") / 1e9, sharded=True),
    }
    return {name: {layer: c.basis_of(layer) for layer in model.layers} for name, c in found.items()}


def sharded_job(rank: int, folder: Path) -> dict[str, Any]:
    """Hold a row-sharded adapter (FSDP2's layout; 5 rows over 2 ranks) and a row-sharded full weight in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    from nspo_lightning.nullspace.keeper import NullSpaceKeeper, certify_layers, references_of

    mesh = init_device_mesh("cpu", (2,))
    basis = calibration().bases[""]
    model, dense = Adapted(), nn.Linear(WIDTH, 7, bias=False)
    holders = [model.down, model.up, dense]
    reference = dense.weight.detach().clone()
    norm = model.down.weight.detach().norm()
    for holder in holders:
        holder.weight = nn.Parameter(distribute_tensor(holder.weight.detach(), mesh, [Shard(0)]))
    layers, bases = [*plan_layers(model).layers, *plan_layers(dense).layers], [basis, basis]
    references = references_of(layers)
    keeper = NullSpaceKeeper(layers, bases, references)
    keeper.start_()

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.full_tensor().detach()

    started = whole(model.down.weight).clone()
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.AdamW([holder.weight for holder in holders], lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        for holder in holders:
            gradient = torch.randn(holder.weight.shape, generator=generator)
            holder.weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        keeper.project_gradients_()
        optimizer.step()
        keeper.reproject_()
    result: dict[str, Any] = {"start_norm": float(started.norm() / norm)}
    result["certificates"] = certify_layers(layers, bases, references, {})
    result["A"] = whole(model.down.weight)
    result["W"] = whole(dense.weight)
    result["W_ref"] = reference
    return result
