"""A fit whose completions come from a server: it learns what local sampling would, and says what it saw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_server import BASE, LoraServer
from tiny_jobs import Recorder, adapter, datamodule, module, trainer

from nspo_lightning.module.experience import ExperienceBuffer
from nspo_lightning.module.rollouts import LocalRollouts, ServerRollouts
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.rollout.server_config import ServerSettings

SAME_WEIGHTS = 1e-5  # float32: the importance ratio is 1 to about 1e-6


def settings(server, folder, **changes):
    plain = ServerSettings(
        base_url=server.url, model=BASE, adapter_folder=str(folder / "shelf"), retries=3, backoff_s=0.01, timeout_s=30.0
    )
    return replace(plain, **changes)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


@pytest.fixture
def server(tiny_llama):
    with LoraServer(tiny_llama) as running:
        yield running


def fit(policy, folder, steps=3, **kwargs):
    recorder = Recorder()
    trainer(folder, steps=steps, callbacks=[recorder], **kwargs).fit(policy, datamodule())
    return recorder.steps


def without_log_probs(drawn):
    return replace(drawn, rollout=replace(drawn.rollout, log_probs=None))


def test_it_learns_what_local_sampling_of_the_same_tokens_would(server, tiny_llama, tmp_path, monkeypatch):
    torch.manual_seed(7)
    remote = module(tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd)
    seen = []
    original = ServerRollouts.draw

    def remember(self, *arguments):
        seen.append(original(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(ServerRollouts, "draw", remember)
    steps = fit(remote, tmp_path)
    for step in steps:
        assert step["sampling/sampling_logp_difference/mean"] < 1e-5
        assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert len({name for kind, name in server.log if kind == "load"}) == 3  # a new adapter for each rollout
    torch.manual_seed(7)
    local = module(tiny_llama, optimizer=sgd)
    replay = iter(seen)
    monkeypatch.setattr(LocalRollouts, "draw", lambda *_: without_log_probs(next(replay)))
    assert "sampling/sampling_logp_difference/mean" not in fit(local, tmp_path)[-1]
    remote_weights, local_weights = adapter(remote), adapter(local)
    moved = 0.0
    for name, value in local_weights.items():
        assert (value - remote_weights[name]).abs().max() < SAME_WEIGHTS
        moved = max(moved, float(value.abs().max()) if "lora_B" in name else 0.0)
    assert moved > 100 * SAME_WEIGHTS  # B starts at zero


def test_a_restart_between_and_within_updates_changes_nothing(server, tiny_llama, tmp_path):
    def weights(restarts):
        policy = module(tiny_llama, rollout_server=settings(server, tmp_path), optimizer=sgd)
        original = policy.collector.rollouts.server.sample

        def sample(*arguments, **kwargs):
            server.forget_next = restarts
            return original(*arguments, **kwargs)

        policy.collector.rollouts.server.sample = sample
        fit(policy, tmp_path)
        return adapter(policy)

    torch.manual_seed(7)
    calm = weights(restarts=False)
    server.log.clear()
    torch.manual_seed(7)
    shaken = weights(restarts=True)
    loaded = [name for kind, name in server.log if kind == "load"]
    assert len(loaded) - len(set(loaded)) >= 3  # again, after a restart
    assert all(torch.equal(value, shaken[name]) for name, value in calm.items())


def test_noise_is_logged_and_capped(server, tiny_llama, tmp_path):
    server.noise = 0.5
    limits = settings(server, tmp_path, importance_cap=1.5, max_logp_difference=5.0)
    policy = module(tiny_llama, rollout_server=limits)
    with pytest.warns(UserWarning, match="differ from the trainer's by"):
        steps = fit(policy, tmp_path)
    for step in steps:
        assert 0.1 < step["sampling/sampling_logp_difference/mean"] < step["sampling/sampling_logp_difference/max"]
        assert step["sampling/importance_sampling_ratio/min"] < 1.0
        assert step["sampling/importance_sampling_ratio/max"] == pytest.approx(1.5)


def test_another_adapter_under_the_right_name_ends_the_run(server, tiny_llama, tmp_path):
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path, max_logp_difference=1e-3))
    fit(policy, tmp_path, steps=1)
    server.applies = BASE
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path, max_logp_difference=1e-3), lr=0.05)
    with pytest.raises(RolloutServerError, match="serves another base, or applies another adapter"):
        fit(policy, tmp_path, steps=6)


def test_a_wrong_start_ends_before_any_work(server, tiny_llama, tmp_path):
    wrong = module(tiny_llama, rollout_server=settings(server, tmp_path, model="other"))
    with pytest.raises(RolloutServerError, match="offers base, not 'other'"):
        fit(wrong, tmp_path)
    assert wrong.policy is None  # nothing was loaded for it


def test_the_key_is_nowhere_in_what_a_run_leaves(server, tiny_llama, tmp_path, monkeypatch, capfd):
    server.key = "sk-planted-rollout-key"
    monkeypatch.setenv("ROLLOUT_API_KEY", server.key)
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path))
    run = trainer(tmp_path, steps=2, enable_checkpointing=True, logger=True)
    run.fit(policy, datamodule())
    run.save_checkpoint(tmp_path / "kept.ckpt")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not [path for path in files if server.key.encode() in path.read_bytes()]
    assert server.key not in "".join(capfd.readouterr())


@pytest.mark.parametrize("beside", [False, True], ids=["of today", "of earlier code"])
def test_a_rollout_in_the_buffer_keeps_its_samplers_log_probs(server, tiny_llama, tmp_path, beside):
    policy = module(tiny_llama, rollout_server=settings(server, tmp_path), num_minibatches=2)
    trainer(tmp_path, steps=1).fit(policy, datamodule(repeat_batches=2))
    left = policy.progress.open_rollouts.get(None)
    assert left is not None
    state = left.state_dict()
    if beside:
        state["sampling_log_probs"] = state["rollout"].pop("log_probs")
    again = ExperienceBuffer.from_state_dict(state, torch.device("cpu"))
    kept = again.experience.rollout.log_probs
    assert kept is not None
    assert torch.equal(kept, left.experience.rollout.log_probs)
    drawn, old = again.next().rollout.log_probs, again.experience.select(slice(1, 2)).old_log_probs
    assert drawn is not None
    assert old is not None
    assert drawn.shape == old.shape
