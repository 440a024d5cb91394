"""A run whose weights are put back counts the updates that stand, and learns nothing of the weights that are gone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lora_server import BASE, LoraServer
from tiny_jobs import Recorder, adapter, datamodule, module, trainer

from nspo_lightning.callbacks import CapabilityGuard, ExactResume, RunReport
from nspo_lightning.checkpoints import updates_in
from nspo_lightning.rollout.server_config import ServerSettings


def guard(**changes: Any) -> CapabilityGuard:
    return CapabilityGuard(**{"max_kl": 1e-9, "every_n_updates": 2, "max_rescues": 100, "text_rows": 2, **changes})


class Seen(Callback):
    """What each step learnt from, behind the guard: is it of the weights that the step began with?"""

    def __init__(self):
        self.weights, self.rollouts, self.updates = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append(adapter(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rollouts.append(pl_module.rollouts)
        self.updates.append(pl_module.updates)


def test_updates_that_were_taken_back_do_not_count(tiny_llama, tmp_path):
    policy, seen = module(tiny_llama), Seen()
    report = RunReport(folder=str(tmp_path / "out"), evaluate=False)
    run = trainer(tmp_path, steps=5, callbacks=[guard(), seen, report])
    with pytest.warns(UserWarning, match=r"No update is left after 5 steps \(.*, 5 taken back\)"):
        run.fit(policy, datamodule())
    assert seen.updates == [1, 0, 1, 0, 1]
    assert (policy.updates, policy.updates_undone) == (0, 5), "the check at the end has taken the last one back"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["updates"], summary["updates_skipped"], summary["updates_undone"]) == (0, 0, 5)


def test_a_checkpoint_holds_the_counts(tiny_llama, tmp_path):
    policy = module(tiny_llama)
    run = trainer(tmp_path, steps=2, callbacks=[guard()])
    run.fit(policy, datamodule())
    run.save_checkpoint(tmp_path / "kept.ckpt")
    assert updates_in(torch.load(tmp_path / "kept.ckpt", weights_only=True)) == 0
    again, seen = module(tiny_llama), Seen()
    trainer(tmp_path, steps=4, callbacks=[guard(), seen]).fit(again, datamodule(), ckpt_path=tmp_path / "kept.ckpt")
    assert seen.updates == [1, 0]
    assert again.updates_undone == 4


@pytest.mark.parametrize("parts", ["num_iterations", "num_minibatches"])
def test_the_rest_of_a_rollout_of_weights_that_are_gone_is_dropped(tiny_llama, tmp_path, parts):
    """Four parts a rollout, a check after three: the fourth part is of a new rollout, by the weights put back."""
    policy, seen, steps = module(tiny_llama, num_iterations=4), Seen(), Recorder()
    if parts == "num_minibatches":
        policy = module(tiny_llama, num_minibatches=4)
    watch = guard(every_n_updates=3)
    trainer(tmp_path, steps=4, callbacks=[watch, seen, steps]).fit(policy, datamodule(batch_size=4, repeat_batches=4))
    assert seen.rollouts == [1, 1, 1, 2]
    assert all(torch.equal(value, seen.weights[0][name]) for name, value in seen.weights[3].items())


def test_gradients_that_were_dropped_weigh_nothing_in_the_update(tiny_llama, tmp_path):
    """A validation in the middle of a window of two: its second batch is the update, at full weight."""

    class Rescues(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                watch._check(trainer, pl_module, validation=True)

    watch, policy = guard(every_n_updates=100), module(tiny_llama)
    weights = []

    class Window(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights.append(len(pl_module.progress.window.weights))

    calls = [watch, Rescues(), Window()]
    trainer(tmp_path, steps=2, accumulate_grad_batches=2, callbacks=calls).fit(policy, datamodule())
    assert watch.rescues
    assert weights == [1, 0, 0, 0]


@pytest.fixture
def server(tiny_llama):
    with LoraServer(tiny_llama) as running:
        yield running


@pytest.mark.parametrize(("every", "stop"), [(1, None), (2, None), (3, 3)])
def test_a_rollout_under_way_of_weights_that_are_gone_is_drawn_anew(server, tiny_llama, tmp_path, every, stop):
    class Learnt(Callback):
        """How old each step's rollout is said to be, and whether its log-probabilities are the present weights'."""

        def __init__(self):
            self.stale, self.near = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.stale.append(float(trainer.callback_metrics["rollout/staleness"]))
            self.near.append(float(trainer.callback_metrics["sampling/sampling_logp_difference/max"]) < 1e-3)
            if stop == trainer.global_step and not (tmp_path / "kept.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "kept.ckpt")

    def job(steps, ckpt_path=None):
        torch.manual_seed(7)
        given = ServerSettings(
            base_url=server.url,
            model=BASE,
            adapter_folder=str(tmp_path / "shelf"),
            overlap=True,
            max_logp_difference=100.0,
        )
        policy = module(tiny_llama, rollout_server=given, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        seen = Learnt()
        calls = [guard(every_n_updates=every), ExactResume(), seen]
        trainer(tmp_path, steps=steps, callbacks=calls).fit(policy, datamodule(), ckpt_path=ckpt_path)
        return policy, seen

    _, seen = job(4)
    fresh = [step == 0 or step % every == 0 for step in range(4)]  # the steps right behind a rescue
    assert seen.near == fresh
    assert seen.stale == [0.0 if one else 1.0 for one in fresh]
    if stop:
        _, resumed = job(4, tmp_path / "kept.ckpt")
        assert resumed.stale == seen.stale[stop:]
        assert resumed.near == seen.near[stop:]
