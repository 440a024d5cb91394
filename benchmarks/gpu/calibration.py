"""Calibration: seconds over those of its own forward passes, and the time of the bases, input by input."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import Device, listening
from made_model import made_bases, policy_settings
from record import Record
from workload import Scale, random_ids, write_folder

from nspo_lightning.nullspace import BasisSettings, ForwardCall, calibrate_modules, plan_layers
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.loading import load_policy

PLAIN_SHARE = 0.1  # of the time, for plain forwards: collecting takes a multiple, and bases come after


class OutOfTimeError(Exception):
    """Ends a calibration whose bases would take longer than there is time."""


class Stages:
    """Notes when calibration begins to make bases, and each of them."""

    def __init__(self, device: Device, record: Record, collected: Callable[[float], None]) -> None:
        self._device, self._record, self._collected = device, record, collected
        self.begin = device.now()
        self.times: list[float] = []

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Take a report of `calibrate_modules`: "layers" comes before the first basis and after each."""
        if stage != "layers":
            return
        self.times.append(self._device.now())
        if len(self.times) == 1:
            self._collected(self.times[0] - self.begin)
        longest = max((b - a for a, b in itertools.pairwise(self.times)), default=0.0)
        if self._record.left() < max(5.0, 1.3 * longest):
            raise OutOfTimeError


def measure(scale: Scale, device: Device, record: Record, folder: Path) -> dict[str, Any]:
    """Calibrate on random text; as many texts as fit."""
    torch.manual_seed(0)
    with made_bases():
        model = load_policy(policy_settings(write_folder(scale, folder), scale.rank, checkpointing=False), device.torch)
    ids = random_ids(scale, scale.texts, scale.text_tokens)
    calls = [ForwardCall(kwargs={"input_ids": rows.to(device.torch)}) for rows in ids.split(scale.text_batch)]
    modules = {layer.name: layer.module for layer in plan_layers(model).layers}

    def forward(input_ids: torch.Tensor) -> None:
        with torch.autocast(device.torch.type, torch.bfloat16):
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)

    with torch.no_grad(), evaluation_mode(model), listening() as heard:
        forward(**calls[0].kwargs)
        one = seconds_of(device, lambda: forward(**calls[1 % len(calls)].kwargs))
        fit = int(record.left() * PLAIN_SHARE / one)
        calls = calls[: max(min(fit, len(calls)), 1)]
        plain = seconds_of(device, lambda: [forward(**call.kwargs) for call in calls])
        device.clear()
        texts = sum(len(call.kwargs["input_ids"]) for call in calls)
        found: dict[str, Any] = {"texts": texts, "tokens": texts * scale.text_tokens, "forward_s": plain, "said": heard}

        def collected(seconds: float) -> None:
            found.update(collecting_s=seconds, ratio=seconds / plain, collecting_gb=device.peak_gb())
            record.add("calibration", found)  # now: one basis more may be one too many

        stages, whole = Stages(device, record, collected), True
        try:
            calibrate_modules(modules, forward, lambda: calls, BasisSettings(), progress=stages)
        except OutOfTimeError:
            whole = False
        end = device.now()
    seconds = [b - a for a, b in itertools.pairwise(stages.times if whole else [*stages.times, end])]
    return found | {"peak_gb": device.peak_gb(), "bases_whole": whole} | bases_of(scale, seconds, whole)


def bases_of(scale: Scale, seconds: list[float], whole: bool) -> dict[str, Any]:
    """Sum up the bases' times; where not all were made, say from the medians what all would take."""
    if whole:
        return {"bases": len(seconds), "bases_s": sum(seconds)}
    made = seconds[:-1]  # the last one was not made
    # Inputs come in the order of a layer's forward pass: q/k/v, o, gate/up, down.
    wide, narrow = made[3::4], [s for number, s in enumerate(made) if number % 4 != 3]
    if not wide or not narrow:
        return {"bases": len(made), "bases_s": None}
    middle = {"narrow": statistics.median(narrow), "wide": statistics.median(wide)}
    estimate = scale.layers * (3 * middle["narrow"] + middle["wide"])
    return {
        "bases": len(made),
        "bases_s": None,
        "basis_narrow_s": middle["narrow"],
        "basis_wide_s": middle["wide"],
        "bases_estimated_s": estimate,
    }


def seconds_of(device: Device, run: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    begin = device.now()
    run()
    return device.now() - begin


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Measure it."""
    record.attempt("calibration", lambda: measure(scale, device, record, folder))
