"""Inside a micro-batch, forward and backward, nothing waits for the device: sizes are known before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from tiny_jobs import datamodule, module, trainer
from tiny_policies import ragged_prompts, tiny_policy

from nspo_lightning.grpo import (
    Normaliser,
    ObjectiveConfig,
    accumulated_loss,
    objective,
    split_microbatches,
    token_weights,
)
from nspo_lightning.module import scorer
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rollout import SamplingConfig, sample


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-window", "qwen3", "gemma2", "gemma3"]
)  # GPT-2's own code asks for a token
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_micro_batch_waits(name, level):
    policy = tiny_policy(name)
    prompts, prompt_mask = ragged_prompts()
    rollout = sample(
        policy,
        prompts,
        prompt_mask,
        group_size=4,
        config=SamplingConfig(max_new_tokens=6),
        eos_token_ids=range(5, 15),
        pad_token_id=0,
        with_log_probs=True,
    )
    mask = rollout.completion_mask
    assert not mask.all()
    weights, others = token_weights(mask, "grpo", Normaliser.of(mask, 6)), torch.zeros(mask.shape)
    config = ObjectiveConfig(beta=0.1, ratio_level=level)

    def one(micro):
        scores = score_completions(policy, micro.rollout, with_entropy=True, counts=micro.counts)
        return objective(
            scores.log_probs,
            mask=micro.take(mask),
            weights=micro.take(weights),
            advantages=micro.take(torch.ones(len(mask))),
            config=config,
            old_log_probs=micro.take(others),
            reference_log_probs=micro.take(others),
            entropy=scores.entropy,
            sampling_log_probs=micro.take(rollout.log_probs),
            importance_cap=2.0,
        ).loss

    score_completions(policy, rollout)  # the trials of the model are behind us
    micros = split_microbatches(rollout, 30)
    assert len(micros) > 1
    with HostSyncs() as syncs:
        accumulated_loss([p for p in policy.parameters() if p.requires_grad], micros, one).backward()
    assert not syncs.found, "\n".join(syncs.found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_micro_batch_of_a_run_waits(tiny_llama, tmp_path, monkeypatch, checkpointing, quantization):
    """What the module adds around it too: KL, importance ratios, later passes over a rollout."""
    found: list[str] = []
    steps: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        with HostSyncs() as syncs:
            loss = accumulated_loss(*args, **kwargs)
        found.extend(syncs.found)
        steps.append(1)
        return loss

    monkeypatch.setattr(scorer, "accumulated_loss", watched)
    settings = PolicySettings(
        path=str(tiny_llama),
        dtype="float32",
        quantization=quantization,
        gradient_checkpointing=checkpointing,
        sampling_weights="merged",
        lora=LoraSettings(r=4),
    )
    policy = module(
        tiny_llama,
        policy=settings,
        objective=ObjectiveConfig(beta=0.1, mask_truncated=False),
        tokens_per_microbatch=60,
        num_iterations=2,
    )
    trainer(tmp_path, steps=4, max_epochs=-1).fit(policy, datamodule(repeat_batches=2))
    assert len(steps) == 4
    assert not found, "\n".join(sorted(set(found)))
