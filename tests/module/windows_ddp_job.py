"""Take updates under DDP on two CPU processes, whose batches differ in size; each rank writes the gradients."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from known_rollouts import (
    GROUP,
    Batches,
    Prompt,
    dynamic,
    gradients,
    gradients_of_loader,
    known_completions,
    known_loader,
    random_epoch,
    score,
    still_policy,
)
from tiny_jobs import Recorder, adapter, module, trainer
from tiny_warmups import data, warmup_module

from nspo_lightning.grpo import LossType, ObjectiveConfig

SEEDS = (0, 3)
DDP: dict[str, Any] = {"strategy": "ddp", "devices": 2}


def dealt(batches: list[list[Prompt]], rank: int) -> list[list[Prompt]]:
    """The batches of a rank: the first has them as they are, the second other ones of other sizes."""
    if rank == 0:
        return batches
    return [
        [Prompt(p.number + 500, p.lengths[::-1], p.cut, p.rewards) for p in batch[: max(1, len(batch) - 1)]]
        for batch in batches
    ]


def parts_of_few_prompts(base: Path, folder: Path, rank: int) -> dict[str, Any]:
    """Three parts of a batch that has three prompts on one rank and two on the other, twice over."""
    objective = ObjectiveConfig(loss_type="bnpo")
    policy = module(base, reward=score, group_size=GROUP, num_minibatches=3, num_iterations=2, objective=objective)
    known_completions(policy)
    batch = [Prompt(500 * rank + i) for i in range(3 - rank)]
    run = trainer(folder, steps=-1, max_epochs=1, **DDP)
    run.fit(policy, train_dataloaders=Batches([batch] * 6))
    return {"rollouts": policy.rollouts, "steps": run.global_step, "weights": adapter(policy)}


LEARNS = (3, 5, 6, 9, 15, 16, 17, 22)
"""Prompts of `replaced` with a signal."""


def replaced(base: Path, folder: Path, rank: int) -> dict[str, Any]:
    """Three batches of a prompt a rank whose groups without a signal are replaced."""
    prompts = [Prompt(i, rewards=(0.0, 1.0) if i in LEARNS else (1.0, 1.0)) for i in range(24)]
    loader = known_loader(prompts, batch_size=1, shard=lambda: (rank, 2))
    policy = dynamic(still_policy(base, "grpo"), max_factor=4)
    found, steps = gradients_of_loader(policy, folder, loader, limit_train_batches=3, **DDP)
    return {"gradients": found, "prompts": [step["dynamic/prompts"] for step in steps]}


def warmed_up(base: Path, folder: Path, batch_size: int, **kwargs: Any) -> dict[str, Any]:
    """Two updates of a warm start, a half of whose rows are general prompts."""
    torch.manual_seed(0)
    given = data(batch_size=batch_size, max_updates=2, refusal_share=1.0)
    taught = warmup_module(base, given)
    seen = Recorder()
    trainer(folder, steps=2, max_epochs=-1, callbacks=[seen], **kwargs).fit(taught, given)
    kl = [step["warmup/general_kl"] for step in seen.steps]
    return {"weights": adapter(taught), "kl": kl, "loss": [step["loss"] for step in seen.steps]}


def main(base: Path, folder: Path) -> None:
    """Run all of it."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found: dict[str, Any] = {}
    for loss_type in get_args(LossType):
        policy = still_policy(base, loss_type)
        for seed in SEEDS:
            batches, accumulate = random_epoch(seed)
            found[f"{loss_type} {seed}"] = gradients(policy, folder, dealt(batches, rank), accumulate, **DDP)
    found = {"windows": found, "parts": parts_of_few_prompts(base, folder, rank)}
    torch.save(
        {**found, "replaced": replaced(base, folder, rank), "warm": warmed_up(base, folder, 2, **DDP)},
        folder / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
