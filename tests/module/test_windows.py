"""An update is that of one batch with all that its window held, whatever the window is made of; or it is not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import pytest
import torch
from known_rollouts import (
    GROUP,
    Batches,
    Prompt,
    gradients,
    known_completions,
    mean_of,
    random_epoch,
    score,
    still_policy,
)
from lightning.pytorch.callbacks import Callback
from tiny_jobs import Recorder, adapter, datamodule, module, trainer
from torch import Tensor

from nspo_lightning.grpo import LossType, ObjectiveConfig
from nspo_lightning.module.experience import ExperienceBuffer

LOSS_TYPES = get_args(LossType)


def cut_into_windows(batches: list[list[Prompt]], accumulate: int) -> dict[int, list[list[Prompt]]]:
    starts = range(0, len(batches), accumulate)
    windows = [batches[start : start + accumulate] for start in starts]
    return {start + len(window) - 1: window for start, window in zip(starts, windows, strict=True)}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_gradient_of_a_window_is_that_of_one_batch_with_all_its_prompts(
    tiny_llama: Path, tmp_path: Path, loss_type: LossType, beta: float
) -> None:
    """For bnpo, whose batches have a mean each, it is the mean over its batches."""
    policy = still_policy(tiny_llama, loss_type, beta)
    for seed in range(4):
        batches, accumulate = random_epoch(seed)
        windows = cut_into_windows(batches, accumulate)
        found = gradients(policy, tmp_path, batches, accumulate)
        if loss_type == "bnpo":
            alone = gradients(policy, tmp_path, batches)
            parts = {end: [alone.get(end - i) for i in range(len(window))] for end, window in windows.items()}
            expected = {end: mean_of([p for p in part if p], len(part)) for end, part in parts.items() if any(part)}
        else:
            whole = gradients(
                policy, tmp_path, [[one for part in window for one in part] for window in windows.values()]
            )
            expected = {end: whole[i] for i, end in enumerate(windows) if i in whole}
        assert found.keys() == expected.keys(), (seed, accumulate)
        for end, values in expected.items():
            scale = max(float(value.abs().max()) for value in values.values())
            assert scale > 1e-6, "nothing is compared"
            for name, value in values.items():
                where = f"seed {seed}, window that ends with batch {end}, {name}"
                torch.testing.assert_close(found[end][name], value, rtol=1e-4, atol=1e-4 * scale, msg=where)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_completions_that_are_all_cut_move_neither_weights_nor_moments(
    tiny_llama: Path, tmp_path: Path, loss_type: LossType, accumulate: int
) -> None:
    class States(Callback):
        def __init__(self) -> None:
            self.seen: list[list[Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            state = [value.clone() for one in trainer.optimizers[0].state.values() for value in one.values()]
            self.seen.append([*adapter(pl_module).values(), *state])

    objective = ObjectiveConfig(loss_type=loss_type, mask_truncated=True)
    policy = module(tiny_llama, reward=score, group_size=GROUP, objective=objective)
    known_completions(policy)
    teaching = [[Prompt(i), Prompt(i + 50)] for i in range(2 * accumulate)]
    cut = [
        [Prompt(i, cut=(True, True)), Prompt(i + 50, rewards=(1.0, 1.0))] for i in range(2 * accumulate, 4 * accumulate)
    ]
    states = States()
    run = trainer(tmp_path, steps=-1, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[states])
    run.fit(policy, train_dataloaders=Batches(teaching + cut))
    learnt, *after = states.seen[2 * accumulate - 1 :]
    assert any(not torch.equal(a, b) for a, b in zip(states.seen[0], learnt, strict=False))
    for state in after:
        assert all(torch.equal(a, b) for a, b in zip(learnt, state, strict=True))
    assert policy.progress.updates_skipped == 2


class Passes:
    """Which update each step of each rollout belongs to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: dict[int, list[int]] = {}
        self.kept: list[ExperienceBuffer] = []  # or a new one might get the number of one that is gone
        self.trainer: pl.Trainer | None = None
        real = ExperienceBuffer.next

        def spy(buffer: ExperienceBuffer) -> Any:
            assert self.trainer is not None
            self.kept.append(buffer)
            self.updates.setdefault(id(buffer), []).append(self.trainer.global_step)
            return real(buffer)

        monkeypatch.setattr(ExperienceBuffer, "next", spy)


@pytest.mark.parametrize(("iterations", "minibatches"), [(2, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_steps_of_a_rollout_are_different_updates(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    iterations: int,
    minibatches: int,
    accumulate: int,
) -> None:
    """Also of the last block of an epoch, which has fewer batches than a window: the job has four or five."""
    passes, steps = Passes(monkeypatch), iterations * minibatches
    policy = module(tiny_llama, num_iterations=iterations, num_minibatches=minibatches, lr=1e-4)
    run = passes.trainer = trainer(tmp_path, steps=-1, max_epochs=2, accumulate_grad_batches=accumulate)
    data = datamodule(batch_size=2, repeat_batches=steps)
    run.fit(policy, data)
    batches = 2 * (len(data.train_dataloader().rows) // 2)
    assert policy.rollouts == len(passes.updates) == batches
    for updates in passes.updates.values():
        assert len(updates) == steps
        assert updates == list(range(updates[0], updates[0] + steps)), "each its own, one after another"


def test_the_second_pass_over_an_accumulated_rollout_is_off_policy(tiny_llama: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    policy = module(tiny_llama, num_iterations=2, lr=0.1)
    run = trainer(tmp_path, steps=2, accumulate_grad_batches=2, callbacks=[recorder])
    run.fit(policy, datamodule(repeat_batches=2))
    assert [step["clip_ratio/region_mean"] > 0 for step in recorder.steps] == [False, False, True, True]


def test_a_batch_with_fewer_prompts_than_parts_takes_as_many_steps(tiny_llama: Path, tmp_path: Path) -> None:
    """Of eight prompts the last batch has two, and each batch comes three times."""
    policy = module(tiny_llama, num_minibatches=3)
    data = datamodule(batch_size=3, repeat_batches=3)
    trainer(tmp_path, steps=-1, max_epochs=1).fit(policy, data)
    assert len(data.train_dataloader().rows) % 3 == 2
    assert policy.rollouts == len(data.train_dataloader()) / 3
    assert policy.progress.updates_skipped == 1
