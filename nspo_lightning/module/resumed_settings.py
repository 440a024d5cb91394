"""Settings that a resumed run must share with the one that it goes on from, and what is said where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from nspo_lightning.compat.lightning import callbacks_of
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.policy.chat_template import chat_template_hash
from nspo_lightning.policy.settings import LoraSettings
from nspo_lightning.terminal import shortened

_SHARED = ("group_size", "scale_rewards", "num_iterations", "num_minibatches")
_BEFORE: dict[str, Any] = {
    "model.dynamic_sampling.max_factor": None,
    "model.guided.share": None,
    "model.guided.system_prompt": None,
    "model.prefixes.share": 0.0,
    "warmup.general_share": 0.0,
}
"""What checkpoints were trained with that are from before a setting."""
_LONGEST_SHOWN = 80


class ResumeError(ValueError):
    """A run that would silently go on as another one."""

    raised_on_all_ranks = True
    """All ranks read the same checkpoint."""


def training_settings(settings: TrainingSettings, policy: TextPolicy, trainer: pl.Trainer) -> dict[str, Any]:
    """Return what decides what is learnt from the same prompts, by the names that users know, as plain values.

    Not among them: what changes no number (micro-batches, shared prompts), what only measures, and what Lightning takes
    from the new Trainer (clipping, precision). Optimizer and schedule are `optimizer_settings`.
    """
    values = {f"model.{name}": vars(settings)[name] for name in _SHARED}
    values |= {f"model.objective.{name}": value for name, value in asdict(settings.objective).items()}
    dynamic, guided = settings.dynamic_sampling, settings.guided
    values["model.dynamic_sampling.max_factor"] = None if dynamic is None else dynamic.max_factor
    values["model.guided.share"] = None if guided is None else guided.share
    values["model.guided.system_prompt"] = None if guided is None else guided.system_prompt
    values["model.prefixes.share"] = settings.prefixes.share
    if settings.prefixes.share:
        values["model.prefixes.max_tokens"] = settings.prefixes.max_tokens
        values["model.prefixes.judged"] = settings.prefixes.judged
    values |= {f"model.sampling.{name}": value for name, value in settings.sampling.numbers().items()}
    values["model.policy.chat_template_kwargs"] = policy.settings.chat_template_kwargs
    values["model.policy.chat_template (a hash of its text)"] = chat_template_hash(policy.tokenizer)
    if policy.settings.lora is not None:
        values["model.policy.lora.dropout"] = policy.settings.lora.dropout
    if not any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)):
        values["trainer.accumulate_grad_batches"] = trainer.accumulate_grad_batches
    return values


def adapter_settings(lora: LoraSettings | None) -> dict[str, Any]:
    """Return what the trained weights mean, as far as their shapes don't show it: how the adapter is scaled."""
    if lora is None:
        return {}
    return {"model.policy.lora.alpha": lora.alpha, "model.policy.lora.use_rslora": lora.use_rslora}


def changed_in_words(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings that differ, old -> new; "" if none does. Earlier checkpoints lack some or all of them."""
    return ", ".join(
        f"`{name}` {shortened(saved[name], _LONGEST_SHOWN)} -> {shortened(now[name], _LONGEST_SHOWN)}"
        for name in now
        if name in saved and saved[name] != now[name]
    )


def check_same_job(saved: str, now: str) -> None:
    """Refuse to resume one job with another's checkpoint."""
    if saved != now:
        raise ResumeError(
            f"The checkpoint was written by `{saved}`, and this is `{now}`, which can't resume it. To go on from what "
            "it has trained, give the adapter of that run instead: `--model.policy.adapter runs/NAME/adapter`."
        )


def check_same_training(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a checkpoint was written with."""
    if changed := changed_in_words({**_BEFORE, **saved}, now):
        raise ResumeError(
            f"The checkpoint belongs to a run with other settings: {changed}. A resumed run goes on as if it had never "
            "stopped, with the optimizer's state and the rollouts that were begun: these settings would change what it "
            "learns on the way, or (the optimizer's and its schedule's) be overruled by that state in silence. Resume "
            "with the checkpoint's own (the first of each two), or begin a new run from the trained adapter (`export` "
            "writes it; `policy.adapter`, docs/questions.md)."
        )


def warn_of_other_weights(saved: str | None, policy: TextPolicy) -> None:
    """Warn where completions are drawn with other weights than before a resume. Earlier checkpoints don't say which.

    Not refused: the policy is the same up to rounding, and a smaller device may have no room for a copy.
    """
    now = policy.sampling_mode
    same_bits = policy.device.type == "cpu" and {saved, now} == {"quantized", "dequantized"}
    if saved is not None and saved != now and not same_bits:
        rank_zero_warn(
            f"The run drew its completions from {saved} weights and goes on with {now} ones: the same policy with "
            f"other rounding, so not bit for bit as if it had never stopped. For that, set `policy.sampling_weights: "
            f"{saved}`."
        )
