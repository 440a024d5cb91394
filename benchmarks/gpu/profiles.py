"""torch.profiler's tables of sampling and of one training step, as text files beside the JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import Device
from record import Record
from sampling import Sampler
from workload import Scale

from nspo_lightning.grpo import (
    Normaliser,
    ObjectiveConfig,
    Rollout,
    accumulated_loss,
    group_advantages,
    objective,
    split_microbatches,
    token_weights,
)
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.scoring import score_completions

ROWS = 40  # operations that a table lists


def profiled(device: Device, run: Callable[[], Any], path: Path) -> dict[str, Any]:
    """Run under the profiler, write its table, and return the sums."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.is_cuda else []
    begin = device.now()
    with torch.profiler.profile(activities=activities) as recorded:
        run()
        seconds = device.now() - begin
    events = recorded.key_averages()
    order = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    table = events.table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
    path.write_text(f"{seconds:.3f} s under the profiler\n{table}\n")
    return {
        "seconds": seconds,
        "device_s": sum(event.self_device_time_total for event in events) / 1e6 if device.is_cuda else None,
        "cpu_s": sum(event.self_cpu_time_total for event in events) / 1e6,
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
        "table": path.name,
    }


def train(device: Device, policy: TextPolicy, rollout: Rollout) -> None:
    """Score, objective and backward of one micro-batch: a prompt's group."""
    model, mask, group = policy.require().train(), rollout.completion_mask, rollout.group_size
    weights = token_weights(mask, "grpo", Normaliser.of(mask, mask.shape[1]))
    advantages = group_advantages(torch.arange(float(group), device=device.torch), group)

    def one(micro: Any) -> torch.Tensor:
        with torch.autocast(device.torch.type, torch.bfloat16):
            scores = score_completions(model, micro.rollout, with_entropy=True)
        return objective(
            scores.log_probs,
            mask=micro.take(mask),
            weights=micro.take(weights),
            advantages=micro.take(advantages),
            config=ObjectiveConfig(),
            entropy=scores.entropy,
        ).loss

    parameters = policy.trainable_parameters()
    accumulated_loss(parameters, split_microbatches(rollout, None, share_prefix=True), one).backward()


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Profile a few tokens of each decoding, then one micro-batch of training."""
    sampler, out = Sampler(scale, device, folder), record.path.parent
    ids: list[torch.Tensor] = []

    def sampling(decoding: str) -> dict[str, Any]:
        sampler.check(decoding)
        policy = sampler.policy("quantized")
        ids[:] = [sampler.draw(decoding, scale.profiled_tokens, policy)]
        run = lambda: sampler.draw(decoding, scale.profiled_tokens, policy)  # noqa: E731
        return profiled(device, run, out / f"profile-sampling-{decoding}.txt")

    def training() -> dict[str, Any]:
        policy = sampler.policy("quantized")
        train(device, policy, sampler.first_group(ids[0]))
        return profiled(
            device, lambda: train(device, policy, sampler.first_group(ids[0])), out / "profile-training.txt"
        )

    for decoding in ("dynamic", "graphs"):
        record.attempt(f"sampling-{decoding}", lambda d=decoding: sampling(d), 8)
    record.attempt("training", training, 5)
