"""What our step costs over group size, prompt and completion length, and where its time goes; see grpo_step.py.

Times are CPU seconds of one thread, which another process on the machine hardly changes.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grpo_step_workers import make_policy
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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
from nspo_lightning.policy.sampling_weights import SamplingWeights
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.rollout import SamplingConfig, sample

GROUPS, PROMPTS, COMPLETIONS = [2, 4, 8, 16, 32], [32, 128, 256, 512, 1024], [16, 32, 64, 128]
DEFAULT = {"group": 8, "prompt": 256, "completion": 32}


class Step:
    """A policy and the two halves of a GRPO step on one prompt."""

    def __init__(self, folder: Path, thin: bool = False) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(make_policy(folder, 1, thin=thin), dtype=torch.float32)
        self.policy: nn.Module = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]

    def sample(self, group: int, prompt: int, completion: int, share: bool = True, prompts: int = 1) -> Rollout:
        """Draw groups with forced length."""
        ids = torch.randint(3, 60, (prompts, prompt), generator=torch.Generator().manual_seed(0))
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


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products by shape, and their floating-point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: Counter[tuple[str, tuple[int, ...], tuple[int, ...], bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation."""
        name = func.overloadpacket.__name__
        if name in {"mm", "bmm", "addmm"}:
            a, b = args[1:3] if name == "addmm" else args[:2]
            self.shapes["bmm" if name == "bmm" else "mm", tuple(a.shape), tuple(b.shape), b.is_contiguous()] += 1
        return func(*args, **(kwargs or {}))

    def flops(self) -> dict[str, float]:
        """Sum operations by kind of product."""
        return self._sums(lambda a, b: 2.0 * math.prod(a) * b[-1])

    def best_seconds(self, known: dict[Any, float]) -> dict[str, float]:
        """Sum what each product takes when nothing else runs: the best of several, one by one."""
        kinds = dict.fromkeys(KINDS, 0.0)
        for (name, a, b, contiguous), count in self.shapes.items():
            shape = (name, a, b, contiguous)
            if shape not in known:
                x, y = torch.randn(a), torch.randn(b) if contiguous else torch.randn(*b[:-2], b[-1], b[-2]).mT
                # Attention has other shapes at each token: one look at each of them is enough.
                known[shape] = best(lambda x=x, y=y: x @ y, repeats=2 if name == "bmm" else 5)  # type: ignore[misc]
            kinds[kind_of(a, b)] += count * known[shape]
        return kinds

    def _sums(self, cost: Callable[[tuple[int, ...], tuple[int, ...]], float]) -> dict[str, float]:
        kinds = dict.fromkeys(KINDS, 0.0)
        for (_, a, b, _), count in self.shapes.items():
            kinds[kind_of(a, b)] += count * cost(a, b)
        return kinds


KINDS = ("base", "adapter", "attention")
RANK = 16


def kind_of(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """Name a product by its shapes: an adapter's has its rank in it."""
    return "attention" if len(a) == 3 else "adapter" if RANK in {a[0], a[1], b[1]} else "base"


def best(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the fewest CPU seconds of a call, after one to warm up; short ones are called several times over."""
    start = time.process_time()
    run()
    calls = max(1, int(0.001 * repeats / max(time.process_time() - start, 1e-6)))
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(calls):
            run()
        seconds.append((time.process_time() - start) / calls)
    return min(seconds)


def halves(step: Step, shape: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """Return the four parts of a step, each to be run alone."""
    rollout = step.sample(**shape)
    (micro,) = split_microbatches(rollout, 2**20, share_prefix=True)

    def score() -> torch.Tensor:
        return score_completions(step.policy, micro.rollout, with_entropy=True).log_probs.sum()

    losses: list[torch.Tensor] = []

    def backward() -> None:
        torch.autograd.grad(losses[0], step.parameters, retain_graph=True)

    losses.append(score())
    return {
        "prefill": lambda: step.sample(**{**shape, "completion": 1}),
        "decode": lambda: step.sample(**shape),  # the prefill is subtracted
        "score": score,
        "backward": backward,
    }


def profile(step: Step) -> dict[str, Any]:
    """Say for each part of a step what it computes, what it takes, and what its products alone would take.

    The shape is that of case a. `dispatch` is the time of the same calls on a policy of the same layers and hardly any
    width: Python and the operations' own overhead.
    """
    shape = {"group": 8, "prompt": 256, "completion": 64, "prompts": 4}
    thin = Step(Path(tempfile.mkdtemp()), thin=True)
    parts, thin_parts = halves(step, shape), halves(thin, shape)
    known: dict[Any, float] = {}
    table: dict[str, Any] = {}
    for name, run in parts.items():
        with Products() as products:
            run()
        table[name] = {
            "flops": products.flops(),
            "products": products.best_seconds(known),
            "seconds": best(run, 2),
            "dispatch": best(thin_parts[name], 2),
        }
        print(name, table[name], flush=True)
    for key in ("seconds", "dispatch"):
        table["decode"][key] -= table["prefill"][key]
    for key in ("flops", "products"):
        table["decode"][key] = {kind: table["decode"][key][kind] - table["prefill"][key][kind] for kind in KINDS}
    wide = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def merged() -> None:
        with SamplingWeights(step.policy, "merged").in_place():
            step.sample(**shape)

    return {
        "parts": table,
        "best_flops_per_second": 2 * 1024**3 / best(lambda: wide[0] @ wide[1]),
        "sampling_seconds": {"quantized": best(parts["decode"], 1), "merged": best(merged, 1)},
    }


def main() -> None:
    """Run one of the two and write it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        step = Step(Path(tmp))
        result = {"scaling": scaling, "profile": profile}[sys.argv[1]](step)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
