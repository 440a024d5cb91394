"""What our step costs over group size, prompt and completion length, and where its time goes; see grpo_step.py.

Times are CPU seconds of one thread, which another process on the machine hardly changes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from grpo_step_workers import make_policy
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

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
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.rollout import SamplingConfig, sample

GROUPS, PROMPTS, COMPLETIONS = [2, 4, 8, 16, 32], [32, 128, 256, 512, 1024], [16, 32, 64, 128]
DEFAULT = {"group": 8, "prompt": 256, "completion": 32}


class Step:
    """A policy and the two halves of a GRPO step on one prompt."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(make_policy(folder, 1), dtype=torch.float32)
        self.policy: nn.Module = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]

    def sample(self, group: int, prompt: int, completion: int, share: bool = True) -> Rollout:
        """Draw a group with forced length."""
        ids = torch.randint(3, 8000, (1, prompt), generator=torch.Generator().manual_seed(0))
        config = SamplingConfig(max_new_tokens=completion, min_new_tokens=completion)
        return sample(
            self.policy,
            ids,
            torch.ones_like(ids).bool(),
            group_size=group,
            config=config,
            eos_token_ids=[2],
            pad_token_id=0,
            generator=torch.Generator().manual_seed(0),
            share_prefix=share,
        )

    def train(self, rollout: Rollout, share: bool = True) -> None:
        """Forward and backward."""
        mask = rollout.completion_mask
        weights = token_weights(mask, "grpo", Normaliser.of(mask, mask.shape[1]))
        advantages = group_advantages(torch.arange(float(len(mask))), rollout.group_size)

        def one(micro: Any) -> torch.Tensor:
            scores = score_completions(self.policy, micro.rollout, share_prefix=share, with_entropy=True)
            return objective(
                scores.log_probs,
                mask=micro.take(mask),
                weights=micro.take(weights),
                advantages=micro.take(advantages),
                config=ObjectiveConfig(),
                entropy=scores.entropy,
            ).loss

        accumulated_loss(self.parameters, split_microbatches(rollout, 2048, share_prefix=share), one).backward()


def measure(step: Step, group: int, prompt: int, completion: int, share: bool = True) -> dict[str, Any]:
    """Time one step."""
    start = time.process_time()
    rollout = step.sample(group, prompt, completion, share)
    middle = time.process_time()
    step.train(rollout, share)
    end = time.process_time()
    return {
        "group": group,
        "prompt": prompt,
        "completion": completion,
        "tokens_shared": prompt + group * completion,
        "tokens_plain": group * (prompt + completion),
        "sample_seconds": middle - start,
        "train_seconds": end - middle,
        "seconds": end - start,
    }


def scaling(step: Step) -> dict[str, Any]:
    """Measure the curves."""
    measure(step, 4, 32, 8)
    measure(step, 4, 32, 8, share=False)
    curves: dict[str, Any] = {}
    for name, values in {"group": GROUPS, "prompt": PROMPTS, "completion": COMPLETIONS}.items():
        curves[name] = []
        for value in values:
            curves[name].append(measure(step, **{**DEFAULT, name: value}))
            print(name, curves[name][-1], flush=True)
    curves["group_plain"] = [measure(step, **{**DEFAULT, "group": group}, share=False) for group in GROUPS[:4]]
    return curves


def profile(step: Step) -> dict[str, Any]:
    """Split a step of case a's shape (one of its four prompts) by kind of operation."""
    shape = {"group": 8, "prompt": 256, "completion": 64}
    measure(step, **shape)
    totals: dict[str, Any] = {}
    rollout: Rollout | None = None
    for half in ("sample", "train"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            if rollout is None:
                rollout = step.sample(**shape)
            else:
                step.train(rollout)
        kinds = dict.fromkeys(["base and adapter matmuls", "attention", "everything else"], 0.0)
        for event in recorded.key_averages():
            name = event.key
            matmul = name in {"aten::mm", "aten::addmm"}
            attention = "scaled_dot_product" in name or name in {"aten::bmm", "aten::_softmax"}
            kind = "base and adapter matmuls" if matmul else "attention" if attention else "everything else"
            kinds[kind] += event.self_cpu_time_total / 1e6
        totals[half] = kinds
    return totals


def main() -> None:
    """Run one of the two and write it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        step = Step(Path(tmp))
        result = {"scaling": scaling, "profile": profile}[sys.argv[1]](step)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
