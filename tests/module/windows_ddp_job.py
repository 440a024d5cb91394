"""Take updates under DDP on two CPU processes, whose batches differ in size; each rank writes the gradients."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from known_rollouts import (
    GROUP,
    Batches,
    Prompt,
    Updates,
    dynamic,
    gradients,
    gradients_of_loader,
    known_completions,
    known_loader,
    random_epoch,
    score,
    still_policy,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_jobs import Recorder, adapter, datamodule, even_tokens, module, trainer
from tiny_warmups import data, warmup_module

from nspo_lightning.callbacks import ExactResume
from nspo_lightning.grpo import LossType, ObjectiveConfig
from nspo_lightning.module.dynamic import DynamicSampling
from nspo_lightning.module.guided import GuidedSampling

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


def saving(folder: Path, name: str, step: int) -> list[Any]:
    """Callbacks that leave a checkpoint behind a step, from which a run goes on exactly."""
    saved = ModelCheckpoint(folder, filename=name, every_n_train_steps=step, save_top_k=-1)
    return [ExactResume(), saved]


def warmed_up(base: Path, folder: Path, batch_size: int, *, resume: bool = False, **kwargs: Any) -> dict[str, Any]:
    """Two updates of a warm start, a half of whose rows are general prompts; or the second from a checkpoint."""
    torch.manual_seed(0)
    given = data(batch_size=batch_size, max_updates=2, refusal_share=1.0)
    taught = warmup_module(base, given)
    seen, path = Recorder(), folder / "warm-step=1.ckpt"
    callbacks = [seen, *saving(folder, "warm-{step}", 1)]
    run = trainer(folder, steps=2, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True, **kwargs)
    run.fit(taught, given, ckpt_path=path if resume else None)
    kl = [step["warmup/general_kl"] for step in seen.steps]
    return {"weights": adapter(taught), "kl": kl, "loss": [step["loss"] for step in seen.steps]}


def some_alike(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """No signal for the prompts with an `e` in their word."""
    scores = even_tokens(prompts, completions, completion_ids)
    return [0.0 if "e" in prompt.split()[-1] else score for prompt, score in zip(prompts, scores, strict=True)]


GUIDED = GuidedSampling(share=0.25, system_prompt="Refuse.")


def guided(
    base: Path, folder: Path, batch_size: int, *, replaces: bool = False, resume: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """Updates of whose groups of four one completion is guided, two to a rollout; or the rest from between two.

    If it `replaces`, groups without a signal are replaced.
    """
    torch.manual_seed(3)
    sampling, reward = (DynamicSampling(), some_alike) if replaces else (None, even_tokens)
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    policy = module(base, reward=reward, guided=GUIDED, dynamic_sampling=sampling, num_iterations=2, **optimizer)
    policy.configure_model()
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.text_policy.trainable_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
    name = "both" if replaces else "guided"
    seen, updates, path = Recorder(), Updates(), folder / f"{name}-step=3.ckpt"
    callbacks = [seen, updates, *saving(folder, f"{name}-{{step}}", 3)]
    run = trainer(folder, steps=6, callbacks=callbacks, enable_checkpointing=True, **kwargs)
    run.fit(policy, datamodule(batch_size=batch_size, repeat_batches=2), ckpt_path=path if resume else None)
    rows = policy.last_rollout.rows() if policy.last_rollout else []
    return {"gradients": updates.seen, "steps": seen.steps, "weights": adapter(policy), "rows": rows}


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
    found |= {"replaced": replaced(base, folder, rank), "guided": guided(base, folder, 2, **DDP)}
    for name, job in (("warm", warmed_up), ("both", partial(guided, replaces=True))):
        found |= {name: job(base, folder, 2, **DDP), f"{name}, resumed": job(base, folder, 2, resume=True, **DDP)}
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
