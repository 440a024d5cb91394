"""Rollouts that a server draws while the one before is trained on: when they are asked for, and what is left."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lora_server import BASE, LoraServer
from tiny_jobs import Recorder, adapter, datamodule, module, trainer

from nspo_lightning.callbacks import ExactResume
from nspo_lightning.datamodules.loader import FOLLOWING, PromptLoader
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.ahead import Ahead
from nspo_lightning.module.training_data import look_ahead
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.rollout.server_config import ServerSettings

LIMIT_S = 20.0


@pytest.fixture
def server(tiny_llama):
    with LoraServer(tiny_llama) as running:
        yield running


def settings(server, folder, **changes):
    plain = ServerSettings(
        base_url=server.url, model=BASE, adapter_folder=str(folder / "shelf"), retries=3, backoff_s=0.01, timeout_s=30.0
    )
    return replace(plain, **{"overlap": True, "max_logp_difference": 100.0, **changes})


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def fit(policy, folder, steps=4, data=None, callbacks=(), ckpt_path=None, **kwargs):
    recorder = Recorder()
    run = trainer(folder, steps=steps, callbacks=[recorder, *callbacks], **kwargs)
    run.fit(policy, data or datamodule(), ckpt_path=ckpt_path)
    return recorder.steps, run


class WaitsForRequest(Callback):
    """Before each backward pass but the last, see that the next batch was asked for already."""

    def __init__(self, server, steps, prompts=2):
        self.server, self.steps, self.prompts, self.counts = server, steps, prompts, []

    def on_before_backward(self, trainer, pl_module, loss):
        wanted = self.prompts * min(len(self.counts) + 2, self.steps)
        end = time.monotonic() + LIMIT_S
        while len(self.server.requests) < wanted and time.monotonic() < end:
            threading.Event().wait(0.01)
        self.counts.append(len(self.server.requests))


def test_the_next_batch_is_asked_for_before_this_one_is_trained_on(server, tiny_llama, tmp_path):
    watch = WaitsForRequest(server, steps=4)
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd(0.5))
    steps, _ = fit(policy, tmp_path, callbacks=[watch])
    assert watch.counts == [4, 6, 8, 8], "a batch of two prompts ahead, and nothing behind the last"
    assert [step["rollout/staleness"] for step in steps] == [0, 1, 1, 1]
    ratios = [step["sampling/importance_sampling_ratio/mean"] for step in steps]
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(step["sampling/sampling_logp_difference/mean"]) > 1e-4 for step in steps[1:])


def test_where_the_policy_stands_still_nothing_else_changes(server, tiny_llama, tmp_path):
    seen = []
    for overlap in (False, True):
        server.requests.clear()
        torch.manual_seed(7)
        shelf = tmp_path / str(overlap)
        policy = module(tiny_llama, rollout_server=settings(server, shelf, overlap=overlap), optimizer=sgd(0.0))
        steps, _ = fit(policy, tmp_path)
        keep = [{k: v for k, v in step.items() if k not in {"step_time", "rollout/staleness"}} for step in steps]
        drawn = sorted((tuple(request["prompt"]), request["seed"]) for request in server.requests)
        seen.append((keep, drawn))
    assert seen[0] == seen[1]


def test_without_it_nothing_is_asked_ahead_and_nothing_logged(server, tiny_llama, tmp_path):
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path, overlap=False), optimizer=sgd(0.5))
    steps, run = fit(policy, tmp_path, steps=2)
    assert len(server.requests) == 4
    assert "rollout/staleness" not in steps[-1]
    assert not run.train_dataloader.look_ahead


@pytest.mark.parametrize(("iterations", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_no_rollout_is_more_than_one_update_old(server, tiny_llama, tmp_path, iterations, accumulate):
    policy = module(
        tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd(0.5), num_iterations=iterations
    )
    data = datamodule(repeat_batches=iterations)
    steps, _ = fit(policy, tmp_path, steps=-1, max_epochs=1, data=data, accumulate_grad_batches=accumulate)
    rollouts = [step["rollout/staleness"] for step in steps]
    assert set(rollouts) == {0, 1}
    assert policy.rollouts == 4
    assert len(server.requests) == 8


def test_an_epoch_begins_afresh_and_ends_with_nothing_under_way(server, tiny_llama, tmp_path):
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd(0.5))
    steps, _ = fit(policy, tmp_path, steps=-1, max_epochs=2, limit_train_batches=2)
    assert [step["rollout/staleness"] for step in steps] == [0, 1, 0, 1]
    assert len(server.requests) == 8
    assert policy.progress.ahead is None


@pytest.mark.parametrize("reply", ["status", "stale"])
def test_an_error_in_the_background_is_raised_with_the_same_message(server, tiny_llama, tmp_path, reply):
    class Breaks(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if reply == "status":
                server.fail_next = [418] * 1000
            else:
                server.answers_as = "another"

    told = []
    for overlap in (False, True):
        server.fail_next, server.answers_as = [], None
        policy = module(tiny_llama, rollout_server=settings(server, tmp_path / str(overlap), overlap=overlap))
        with pytest.raises(RolloutServerError) as caught:
            fit(policy, tmp_path, callbacks=[Breaks()])
        told.append(str(caught.value).split("'nspo-")[0])
        assert policy.updates in {1, 2}
    assert told[0] == told[1]


def test_an_exception_stops_what_is_under_way(server, tiny_llama, tmp_path):
    class Ends(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            server.fail_next = [503] * 10_000
            server.delay_s = 0.0
            raise RuntimeError("the end")

    server.delay_s = 0.2
    limits = settings(server, tmp_path, retries=10_000)
    policy = module(tiny_llama, rollout_server=limits)
    with pytest.raises(RuntimeError, match="the end"):
        fit(policy, tmp_path, callbacks=[Ends()])
    end = time.monotonic() + LIMIT_S
    while any(t.name == "rollout-ahead" for t in threading.enumerate()) and time.monotonic() < end:
        threading.Event().wait(0.02)
    assert not [t for t in threading.enumerate() if t.name == "rollout-ahead"]
    server.fail_next, server.delay_s = [], 0.0
    steps, _ = fit(policy, tmp_path, steps=2)
    assert [step["rollout/staleness"] for step in steps] == [0, 1], "the same module can be trained again"


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_with_the_rollout_that_was_under_way(server, tiny_llama, tmp_path, stop):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stop and not (tmp_path / "kept.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "kept.ckpt")

    def job(folder):
        return module(tiny_llama, rollout_server=settings(server, folder), optimizer=sgd(0.5))

    torch.manual_seed(7)
    whole = job(tmp_path / "whole")
    steps, _ = fit(whole, tmp_path, callbacks=[ExactResume(), Saves()])
    again = job(tmp_path / "again")
    resumed, _ = fit(again, tmp_path, callbacks=[ExactResume()], ckpt_path=tmp_path / "kept.ckpt")
    assert [s["rollout/staleness"] for s in resumed] == [1] * (4 - stop)
    assert [s["reward"] for s in resumed] == [s["reward"] for s in steps[stop:]]
    weights, others = adapter(whole), adapter(again)
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize("beside", [False, True], ids=["of today", "of earlier code"])
def test_a_rollout_in_a_checkpoint_is_loaded_with_its_log_probs(beside):
    ids, mask, log_probs = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-1.5, -0.5]])
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        group_size=1,
        completion_ids=ids,
        completion_mask=mask,
        finished=mask[:, 0],
        log_probs=log_probs,
    )
    answer: Future[Rollout] = Future()
    answer.set_result(rollout)
    state = Ahead(prompt_ids=ids, seed=1, update=2, answer=answer).state_dict(wait=True)
    assert state is not None
    if beside:
        state["log_probs"] = state["rollout"].pop("log_probs")
    loaded = Ahead.from_state_dict(state, torch.device("cpu")).answer.result().log_probs
    assert loaded is not None
    assert torch.equal(loaded, log_probs)


def test_a_checkpoint_of_an_interrupted_run_does_not_wait(server, tiny_llama, tmp_path):
    class Interrupts(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 1:
                raise RuntimeError("a signal")

        def on_exception(self, trainer, pl_module, exception):
            pl_module.progress.ahead = replace(pl_module.progress.ahead, answer=type(pl_module.progress.ahead.answer)())
            trainer.save_checkpoint(tmp_path / "kept.ckpt")

    policy = module(tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd(0.5))
    with pytest.raises(RuntimeError, match="a signal"):
        fit(policy, tmp_path, callbacks=[Interrupts()])
    content = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert content["nspo_lightning"]["ahead"] == []
    again = module(tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd(0.5))
    steps, _ = fit(again, tmp_path, ckpt_path=tmp_path / "kept.ckpt")
    assert steps[0]["rollout/staleness"] == 0


def test_a_loader_that_shows_nothing_ahead_is_told(server, tiny_llama, tmp_path):
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path))
    run: Any = SimpleNamespace(train_dataloader=[{"prompt": ["a"]}])
    with pytest.warns(UserWarning, match="`rollout_server.overlap` has no effect: list does not show"):
        look_ahead(run, policy.settings)


@pytest.mark.parametrize(("repeat", "window"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_the_loader_shows_each_batch_once_before_it_comes(repeat, window):
    def rows():
        return [PromptRow(prompt=str(i), kind="harmful", skill="s", source="s", where=str(i)) for i in range(5)]

    def collate(chosen):
        return {"prompt": [row.prompt for row in chosen]}

    def loader():
        return PromptLoader([rows()], collate, batch_size=1, repeat_batches=repeat, window=lambda: window)

    plain, ahead = loader(), loader()
    ahead.look_ahead = True
    batches = list(ahead)
    assert [{k: v for k, v in batch.items() if k != FOLLOWING} for batch in batches] == list(plain)
    shown = [batch[FOLLOWING]["prompt"] for batch in batches if FOLLOWING in batch]
    assert shown == [["1"], ["2"], ["3"], ["4"]]
    came = [batch["prompt"] for batch in batches]
    for number, batch in enumerate(batches):
        if FOLLOWING in batch:
            assert came[number + 1] == batch[FOLLOWING]["prompt"]
            assert batch[FOLLOWING]["prompt"] not in came[: number + 1]
