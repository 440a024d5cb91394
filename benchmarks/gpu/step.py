"""Seconds and memory of our GRPO step, and what the projection takes of it, under a Lightning Trainer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from device import Device, Spent, listening
from made_model import made_bases, policy_settings
from record import Record
from torch.utils.data import DataLoader
from typing_extensions import override
from workload import LEARNING_RATE, Scale, batches, even_ids, write_folder

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.callbacks.null_space.basis_source import BasisSource
from nspo_lightning.grpo import ObjectiveConfig
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.nullspace import Basis, Calibration, ProtectedLayer, Spectrum, build_basis, choose_rank
from nspo_lightning.nullspace.keeper import NullSpaceKeeper
from nspo_lightning.rollout import SamplingConfig

FIRST = [("auto", True), ("quantized", True)]  # sampling weights, gradient checkpointing
REST = [("auto", False)]
SMALL_CARD_GB = 23.0  # of 24 GB: the rest is what CUDA itself takes
STEPS = 3  # after one to warm up, if time allows
PROJECTIONS = ["project_gradients_", "reproject_"]
SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}


@dataclass(kw_only=True)
class RandomBases(BasisSource):
    """Gives random null spaces: a step costs the same as with calibrated ones of that size.

    They are made where they are wanted: a file of them would have gigabytes.
    """

    protected: int

    @override
    def find(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
        earlier: Mapping[str, Any] | None,
    ) -> Calibration:
        groups: dict[str, list[str]] = {}
        for layer in layers:  # those that read one input share a basis, as calibration would find
            place, _, name = layer.name.rpartition(".")
            groups.setdefault(f"{place}.{SHARED.get(name, name)}", []).append(layer.name)
        held = {layer.name: layer for layer in layers}
        drawn: dict[int, torch.Tensor] = {}
        bases = {names[0]: self._basis(held[names[0]], drawn) for names in groups.values()}
        return Calibration(bases=bases, groups={names[0]: names for names in groups.values()}, settings=self.settings)

    def _basis(self, layer: ProtectedLayer, drawn: dict[int, torch.Tensor]) -> Basis:
        width, device = layer.width, layer.matrix.device
        if width not in drawn:
            drawn[width] = torch.linalg.qr(torch.randn(width, self.protected, device=device)).Q
        vectors = drawn[width][torch.randperm(width, device=device)]  # orthonormal too, at no cost
        values = torch.zeros(width, dtype=torch.float64)
        values[: self.protected] = torch.linspace(2, 1, self.protected, dtype=torch.float64)
        choice = choose_rank(values, "rank", self.protected)
        return build_basis(Spectrum(values=values, vectors=vectors, tokens=self.protected), choice)


def random_projection(protected: int) -> NullSpaceProjection:
    """Hold the adapter in random null spaces."""
    # No text: there is nothing that the check before training could look at.
    projection = NullSpaceProjection([], criterion="rank", threshold=protected, cache_dir=None, verify=False)
    projection.source = RandomBases(source=[], settings=projection.settings, cache_dir=None, protected=protected)
    return projection


class Steps(pl.Callback):
    """Times training steps, sampling and projection in them, and notes the peaks of memory."""

    def __init__(self, device: Device, record: Record) -> None:
        self.device, self.record, self.spent = device, record, Spent(device)
        self.found: list[dict[str, float]] = []
        self._begin = self._sampling_gb = 0.0

    def sampled(self) -> None:
        """Note the memory of sampling, at its end."""
        self._sampling_gb = self.device.peak_gb()
        self.device.reset_peak()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.spent.take()
        self.device.reset_peak()
        self._begin = self.device.now()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop the clock, and the run if another step would not fit."""
        seconds, spent = self.device.now() - self._begin, self.spent.take()
        projection = sum(spent.get(name, 0.0) for name in PROJECTIONS)
        one = {"seconds": seconds, "sampling_s": spent["generate"], "projection_s": projection}
        self.found.append(one | {"sampling_gb": self._sampling_gb, "training_gb": self.device.peak_gb()})
        if len(self.found) > 1 and self.record.left() < 1.5 * seconds:
            trainer.should_stop = True


def measure(
    scale: Scale,
    device: Device,
    record: Record,
    folder: Path,
    weights: str,
    checkpointing: bool,
) -> dict[str, Any]:
    """Train a few steps."""
    device.clear()
    held = device.peak_gb()
    sampling = SamplingConfig(max_new_tokens=scale.new_tokens, min_new_tokens=scale.new_tokens)
    torch.manual_seed(0)
    module = GRPOModule(
        even_ids,
        policy=policy_settings(folder, scale.rank, checkpointing=checkpointing, sampling_weights=weights),
        # Not fused: Lightning refuses to clip gradients for an optimizer that unscales them itself.
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0),
        group_size=scale.group,
        sampling=sampling,
        objective=ObjectiveConfig(loss_type="grpo"),
        tokens_per_microbatch=scale.prompt_tokens + scale.microbatch * scale.new_tokens,
    )
    steps = Steps(device, record)
    trainer = pl.Trainer(
        accelerator="gpu" if device.is_cuda else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=1 + STEPS,
        max_epochs=-1,
        gradient_clip_val=1.0,  # TRL's default
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[random_projection(scale.protected), steps],
    )
    limit = SMALL_CARD_GB if weights == "quantized" else None
    with (
        made_bases(),
        listening() as heard,
        device.limited(limit),
        steps.spent.methods(NullSpaceKeeper, PROJECTIONS),
        steps.spent.methods(TextPolicy, ["generate"], after=steps.sampled),
    ):
        trainer.fit(module, DataLoader(batches(scale, 1 + STEPS, device.torch), batch_size=None))  # type: ignore[arg-type]
    check_trained(module, len(steps.found))
    measured = steps.found[1:]
    middle = {name: statistics.median(step[name] for step in measured) for name in measured[0]}
    return {
        "seconds_a_step": middle["seconds"],
        "sampling_s": middle["sampling_s"],
        "training_s": middle["seconds"] - middle["sampling_s"],
        "projection_s": middle["projection_s"],
        "projection_share": middle["projection_s"] / middle["seconds"],
        "sampling_tokens_a_second": scale.rows * scale.new_tokens / middle["sampling_s"],
        "sampling_gb": middle["sampling_gb"],
        "training_gb": middle["training_gb"],
        "peak_gb": max(max(step["sampling_gb"], step["training_gb"]) for step in steps.found),
        "reserved_gb": device.reserved_gb(),
        "held_before_gb": held,
        "memory_limit_gb": limit if device.is_cuda else None,
        "gradient_checkpointing": checkpointing,
        "sampling_weights": module.text_policy.sampling_mode,
        "bases": f"random, {scale.protected} protected directions",
        "steps": steps.found,
        "said": heard,
    }


def check_trained(module: GRPOModule, steps: int) -> None:
    """See that each step was an update with finite numbers, which is what was to be timed.

    Raises:
        RuntimeError: If not.
    """
    progress, adapter = module.progress, module.text_policy.trainable_parameters()
    skipped = {"without signal": progress.updates_skipped, "not finite": progress.updates_nonfinite}
    if any(skipped.values()) or module.trainer.global_step != steps:
        raise RuntimeError(f"Expected {steps} updates, got {module.trainer.global_step}; skipped: {skipped}.")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in adapter):
        raise RuntimeError("The adapter is not finite after these updates.")


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Measure kinds of steps, the default first."""
    write_folder(scale, folder)
    kinds = [kind for kind in FIRST if named(*kind) not in earlier]
    slowest = 0.0
    for weights, checkpointing in [*kinds, *REST] if rest else FIRST:
        found = record.attempt(
            named(weights, checkpointing),
            lambda w=weights, c=checkpointing: measure(scale, device, record, folder, w, c),
            3 * slowest,
        )
        if found is not None:
            slowest = max(slowest, found["seconds_a_step"])


def named(weights: str, checkpointing: bool) -> str:
    """Name a kind of step."""
    return f"{weights}{'+checkpointing' if checkpointing else ''}"
