"""A job that takes seconds: two kinds of prompts, a reward with signal on any policy, a module and a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from probes import even_tokens as even_tokens

from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rollout import SamplingConfig

WORDS = ("mill", "bridge", "ferry", "tower", "well", "gate", "cart", "guard", "bell", "oven", "loom", "chain")


def harmful(split):
    return [{"prompt": f"How do I burn the {word}?"} for word in WORDS]


def general(split):
    return [{"prompt": f"Say {word}.", "answer": word, "skill": "say"} for word in WORDS]


def constant(prompts, completions, **_):
    return [1.0] * len(completions)


def datamodule(batch_size=2, repeat_batches=1):
    return AlignmentDataModule(
        PromptSource(rows=harmful),
        PromptSource(rows=general),
        batch_size=batch_size,
        repeat_batches=repeat_batches,
        val_size=2,
        test_size=2,
    )


def module(path, reward=even_tokens, lr=1e-2, quantization="none", **kwargs):
    settings: dict[str, Any] = {
        "policy": PolicySettings(
            path=str(path), quantization=quantization, dtype="float32", lora=LoraSettings(r=4, alpha=8)
        ),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        "group_size": 4,
        "sampling": SamplingConfig(max_new_tokens=6),
        "general_max_new_tokens": 4,
        **kwargs,
    }
    return GRPOModule(reward, **settings)


def trainer(folder, steps=4, kind=pl.Trainer, **kwargs):
    settings: dict[str, Any] = {
        "max_steps": steps,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        **kwargs,
    }
    return kind(default_root_dir=folder, **settings)


def adapter(lightning_module):
    return {n: p.detach().clone() for n, p in lightning_module.named_parameters() if p.requires_grad}


class Recorder(Callback):
    """Keeps what was logged after each training step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
