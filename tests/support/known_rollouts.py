"""A GRPO job whose completions and rewards are known beforehand, and the gradients of its updates."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tiny_jobs import Recorder, module, trainer
from torch import Tensor

from nspo_lightning.datamodules.loader import PromptLoader
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.grpo import LossType, ObjectiveConfig, Rollout
from nspo_lightning.module.dynamic import DynamicSampling
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.rollout import SamplingConfig

GROUP, LIMIT = 2, 5


class Prompt(str):
    """A prompt whose completions are known: their lengths, which were cut, and their rewards."""

    number: int
    lengths: Sequence[int]
    cut: Sequence[bool]
    rewards: Sequence[float]

    def __new__(
        cls,
        number: int,
        lengths: Sequence[int] = (3, 5),
        cut: Sequence[bool] = (False, False),
        rewards: Sequence[float] = (0.0, 1.0),
    ) -> Prompt:
        self = super().__new__(cls, number)
        self.number, self.lengths, self.cut, self.rewards = number, lengths, cut, rewards
        return self


@dataclass
class Updates(Callback):
    """The gradients of each update, by the batch that it followed."""

    seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.seen[trainer.fit_loop.epoch_loop.batch_idx] = gradients


def score(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    return [float(completion) for completion in completions]


def known_completions(policy: GRPOModule) -> None:
    """Have the policy answer as its prompts say, instead of sampling."""

    def generate(batch: Any, *_: Any, **__: Any) -> tuple[Rollout, list[str]]:
        rows = [(prompt, g) for prompt in batch["prompt"] for g in range(GROUP)]
        ids = torch.zeros(len(rows), LIMIT, dtype=torch.long)
        for row, (prompt, g) in enumerate(rows):
            noise = torch.Generator().manual_seed(100 * prompt.number + g)
            ids[row] = torch.randint(10, 300, (LIMIT,), generator=noise)
        lengths = torch.tensor([prompt.lengths[g] for prompt, g in rows])
        rollout = Rollout(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            group_size=GROUP,
            completion_ids=ids,
            completion_mask=torch.arange(LIMIT) < lengths[:, None],
            finished=~torch.tensor([prompt.cut[g] for prompt, g in rows]),
        )
        return rollout, [str(prompt.rewards[g]) for prompt, g in rows]

    policy.text_policy.generate = generate  # type: ignore[method-assign, assignment]


class Batches:
    """A loader of the user's own."""

    def __init__(self, batches: Sequence[Sequence[Prompt]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (batch_of(batch) for batch in self.batches)


def batch_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    noise = [torch.Generator().manual_seed(prompt.number) for prompt in prompts]
    ids = torch.stack([torch.randint(10, 300, (4,), generator=one) for one in noise])
    return {"prompt": list(prompts), "prompt_ids": ids, "prompt_mask": torch.ones_like(ids, dtype=torch.bool)}


def gradients(
    policy: GRPOModule, folder: Path, batches: Sequence[Sequence[Prompt]], accumulate: int = 1, **kwargs: Any
) -> dict[int, dict[str, Tensor]]:
    """The gradients of an epoch's updates, by their last batch, in which no weight moves."""
    updates = Updates()
    run = trainer(folder, steps=-1, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[updates], **kwargs)
    run.fit(policy, train_dataloaders=Batches(batches))
    return updates.seen


def still_policy(path: Path, loss_type: LossType, beta: float = 0.0) -> GRPOModule:
    """A policy that never learns, with an adapter that is not zero."""
    policy: GRPOModule = module(
        path,
        reward=score,
        group_size=GROUP,
        sampling=SamplingConfig(max_new_tokens=LIMIT),
        objective=ObjectiveConfig(loss_type=loss_type, mask_truncated=True, beta=beta),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    policy.configure_model()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.text_policy.trainable_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
    known_completions(policy)
    return policy


KINDS: dict[str, dict[str, Any]] = {
    "learns": {},
    "flat": {"rewards": (1.0, 1.0)},
    "all cut": {"cut": (True, True)},
    "half cut": {"cut": (True, False)},
}


def random_epoch(seed: int) -> tuple[list[list[Prompt]], int]:
    """Batches of unequal numbers of prompts, some with nothing to learn, and a last window that is shorter."""
    choose, numbers = random.Random(seed), iter(range(1000))

    def prompt(kind: str) -> Prompt:
        lengths = (choose.randint(1, LIMIT), choose.randint(1, LIMIT))
        return Prompt(next(numbers), **{"lengths": lengths, **KINDS[kind]})

    accumulate = choose.randint(2, 4)
    count = 2 * accumulate + choose.randint(1, accumulate - 1)
    kinds = [choose.choice([*KINDS, "learns"]) if seed % 2 else "learns" for _ in range(count)]
    kinds[0] = choose.choice(["all cut", "flat", "learns"])
    return [[prompt(kind) for _ in range(choose.randint(1, 3))] for kind in kinds], accumulate


def mean_of(parts: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    return {name: sum((part[name] for part in parts), torch.zeros(())) / count for name in parts[0]}


def known_loader(prompts: Sequence[Prompt], batch_size: int = 2, **options: Any) -> PromptLoader:
    """A loader of this package, of known prompts in their order."""
    rows = [
        PromptRow(prompt=str(place), skill="s", kind="harmful", source="s", where=f"row {place}")
        for place in range(len(prompts))
    ]

    def collate(part: Sequence[PromptRow]) -> dict[str, Any]:
        return batch_of([prompts[int(str(row.prompt))] for row in part])

    return PromptLoader([rows], collate, batch_size=batch_size, **options)


def dynamic(policy: GRPOModule, max_factor: int = 3) -> GRPOModule:
    """The same policy with dynamic sampling."""
    policy.settings = replace(policy.settings, dynamic_sampling=DynamicSampling(max_factor=max_factor))
    policy.collector = replace(policy.collector, settings=policy.settings)
    return policy


def gradients_of_loader(
    policy: GRPOModule, folder: Path, loader: PromptLoader, accumulate: int = 1, **kwargs: Any
) -> tuple[dict[int, dict[str, Tensor]], list[dict[str, float]]]:
    """As `gradients`, of an epoch of a loader, and what was logged at each step."""
    updates, recorder = Updates(), Recorder()
    settings = {"accumulate_grad_batches": accumulate, "callbacks": [updates, recorder], **kwargs}
    trainer(folder, steps=-1, max_epochs=1, **settings).fit(policy, train_dataloaders=loader)
    return updates.seen, recorder.steps
