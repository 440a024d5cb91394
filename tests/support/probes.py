"""What configurations of tests name: rewards, callbacks that write down what they see, and callbacks that fail."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nspo_lightning.rewards import RewardError, RulesJudge

_calls = 0


def even_tokens(prompts, completions, completion_ids, **_):
    """The share of even token ids: a signal on any policy."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def now_and_then(prompts, completions, completion_ids, **_):
    """The same at the first, third, ... rollout, and no signal in between; and then for a third of the prompts only.

    So some batches have none, and some have some on one rank alone.
    """
    global _calls
    _calls += 1
    numbers = [int("".join(c for c in prompt if c.isdigit())) for prompt in prompts]
    seen = even_tokens(prompts, completions, completion_ids)
    return [reward if _calls % 2 and number % 3 == 0 else 0.0 for reward, number in zip(seen, numbers, strict=True)]


class JudgeThatFails(RulesJudge):
    """Give up on one rank, as a guard does on a text that is too long for it."""

    def classify(self, prompts, completions, **columns):
        if dist.is_initialized() and dist.get_rank() == 1:
            raise RewardError("no verdict", reward="judge")
        return super().classify(prompts, completions, **columns)


class Gradients(Callback):
    """Write down the gradients of the first update, summed over ranks and projected, as the optimizer sees them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        path = Path(f"gradients-{trainer.world_size}-{trainer.global_rank}.pt")
        if trainer.global_step == 0:
            found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
            torch.save(found, path)


class FinalWeights(Callback):
    """Write down each rank's own weights at the end of training."""

    def on_train_end(self, trainer, pl_module):
        weights = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(weights, Path(trainer.log_dir) / f"weights-{trainer.global_rank}.pt")


class PromptsSeen(Callback):
    """Write down which prompts a rank trained on, a line a step, in the groups that were compared."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        prompts = pl_module.last_rollout.prompts
        with (Path(trainer.log_dir) / f"prompts-{trainer.global_rank}.txt").open("a") as file:
            file.write("\t".join(prompts) + "\n")


class Fails(Callback):
    """Raise on one rank in the middle of training, as a bug would."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == 1:
            Path("failed.txt").write_text(str(time.time()))
            raise RuntimeError(f"planted on rank {self.rank}")


class Sleeps(Callback):
    """Hold one rank up before its step, as a long completion or reward does."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == 1:
            time.sleep(self.seconds)


class SaysWhere(Callback):
    """Leave a mark when a step begins, for a test that waits for it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Path(f"step-{batch_idx}-{trainer.global_rank}").touch()
        if batch_idx == 2:
            time.sleep(2.0)  # long enough for a signal to come in the middle


class SaysWhatItDoes(Callback):
    """Hold up each batch of what measures and calibrates, and leave a mark as it begins, for a test that waits for it.

    Marks are ``<what>-<number>-<rank>``: text scored, answers given, forward passes of the calibration.
    """

    def setup(self, trainer, pl_module, stage):
        for what, owner, name in (
            ("scores", pl_module, "text_scores"),
            ("answers", pl_module.evaluator, "answer"),
            ("passes", pl_module, "calibration_forward"),
        ):
            if not isinstance(getattr(owner, name), _Marked):
                setattr(owner, name, _Marked(getattr(owner, name), f"{what}-{{}}-{trainer.global_rank}"))


class _Marked:
    def __init__(self, real, mark):
        self.real, self.mark, self.calls = real, mark, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        Path(self.mark.format(self.calls)).touch()
        time.sleep(0.5)
        return self.real(*args, **kwargs)
