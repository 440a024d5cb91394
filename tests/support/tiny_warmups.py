"""A warm start that takes seconds: few prompts, one refusal, a judge that knows it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_jobs import general, harmful

from nspo_lightning.datamodules import PromptSource
from nspo_lightning.datamodules.warmup import WarmupDataModule, WarmupSettings
from nspo_lightning.module.warmup import WarmupModule
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rewards import Judge, Reward
from nspo_lightning.rollout import SamplingConfig

EXACT: dict[str, Any] = {"criterion": "energy", "threshold": 1e-9}
"""Nothing of the calibration text's energy is left free."""


class Nay(Judge, Reward):
    """Whatever begins with an N refuses."""

    name = "nay"

    def __call__(self, prompts, completions, **_):
        return [float(text.startswith("N")) for text in completions]

    def classify(self, prompts, completions, **_):
        return ["refusal" if text.startswith("N") else "safe" for text in completions]


def data(kind=WarmupDataModule, **warmup):
    sizes: dict[str, Any] = {"val_size": 4, "test_size": 2, "calibration_size": 3}
    found = kind(PromptSource(rows=harmful), PromptSource(rows=general), batch_size=2, **sizes)
    settings: dict[str, Any] = {"refusals": ["No."], "lr": 3e-2, "check_every": 2, "batch_size": 4, **warmup}
    found.warmup = WarmupSettings(**settings)
    return found


def policy(path, **changes):
    settings: dict[str, Any] = {
        "path": str(path),
        "quantization": "none",
        "dtype": "float32",
        "lora": LoraSettings(r=4, alpha=8),
    }
    return PolicySettings(**settings | changes)


def warmup_module(path, data, **kwargs):
    found = WarmupModule(
        Nay(),
        policy=policy(path),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        group_size=4,
        sampling=SamplingConfig(max_new_tokens=4),
        general_max_new_tokens=4,
        **kwargs,
    )
    found.warmup = data.warmup
    return found
