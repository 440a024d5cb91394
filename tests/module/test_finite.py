"""What is not finite is skipped, counted and reported, and never reaches a weight or an optimizer's state."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny_jobs
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import nspo_lightning.module.scorer as scoring
from nspo_lightning.callbacks import ExactResume, LastOnException
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.module.finite import LARGEST_GRADIENT, NonFiniteError, nonfinite_gradient, nonfinite_in
from nspo_lightning.rewards import NonFiniteRewardError


class EvenTokens:
    """The share of even token ids; infinite or NaN in the calls that `spoil` names."""

    def __init__(self, spoil=(), value=math.inf):
        self.calls, self.spoil, self.value = 0, spoil, value

    def __call__(self, prompts, completions, completion_ids, **_):
        self.calls += 1
        scores = [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]
        return [self.value, *scores[1:]] if self.calls in self.spoil else scores


class States(Callback):
    """Weights and optimizer state after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = [p.detach().clone() for p in pl_module.text_policy.trainable_parameters()]
        moments = [v.clone() for s in trainer.optimizers[0].state.values() for v in s.values() if v.ndim]
        self.seen.append((weights, moments))


class SpoiltGradient(Callback):
    def __init__(self, batches, value):
        self.batches, self.value = batches, value

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            pl_module.text_policy.trainable_parameters()[3].grad[0, 0] = self.value


def module(path, reward=None, **kwargs):
    return tiny_jobs.module(path, reward or EvenTokens(), **kwargs)


def fit(policy, folder, *callbacks, steps=4, **kwargs):
    run = tiny_jobs.trainer(folder, steps=steps, callbacks=list(callbacks), kind=Trainer, **kwargs)
    run.fit(policy, tiny_jobs.datamodule())
    return run


def spoil(monkeypatch, what, batches):
    """Make something of the second batch infinite or NaN; returns (reward, callbacks)."""
    if what == "reward":
        return EvenTokens(spoil={b + 1 for b in batches}), []
    if what in {"gradient", "huge gradient"}:
        return None, [SpoiltGradient(batches, math.nan if what == "gradient" else 10 * LARGEST_GRADIENT)]
    calls = []
    name = "score_completions" if what == "log-probabilities" else "objective"
    real = getattr(scoring, name)

    def spoilt(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        if len(calls) - 1 not in batches:
            return result
        if what == "log-probabilities":
            return replace(result, log_probs=result.log_probs * math.nan)
        return replace(result, loss=result.loss * math.inf)

    monkeypatch.setattr(scoring, name, spoilt)
    return None, []


WHAT = ("reward", "log-probabilities", "loss", "gradient", "huge gradient")


@pytest.mark.parametrize("what", WHAT)
def test_the_update_is_skipped_and_counted(tiny_llama, tmp_path, monkeypatch, what):
    reward, callbacks = spoil(monkeypatch, what, {1})
    states, policy = States(), module(tiny_llama, reward)
    trainer = fit(policy, tmp_path, states, *callbacks)
    assert policy.progress.updates_nonfinite == 1
    assert policy.progress.nonfinite_in_a_row == 0
    assert float(trainer.callback_metrics["updates_nonfinite"]) == 1
    for weights, moments in states.seen:
        assert all(bool(value.isfinite().all()) for value in (*weights, *moments))
    (first, _), (second, _), (third, _) = states.seen[:3]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states.seen[0][1], states.seen[1][1], strict=True))


@pytest.mark.parametrize("what", WHAT)
def test_after_so_many_in_a_row_the_run_stops_and_says_what_it_saw(tiny_llama, tmp_path, monkeypatch, what):
    reward, callbacks = spoil(monkeypatch, what, {1, 2, 3, 4, 5, 6})
    policy = module(tiny_llama, reward, max_nonfinite_updates=2)
    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_last=True)
    everything = [*callbacks, keep, ExactResume(), LastOnException()]
    with pytest.raises(NonFiniteError, match=r"2 updates in a row.*learning rate") as stop:
        fit(policy, tmp_path, *everything, steps=8, enable_checkpointing=True)
    assert f"seen: {what.removeprefix('huge ')}" in str(stop.value)
    saved = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())


def test_a_window_with_one_bad_batch_is_skipped_whole(tiny_llama, tmp_path, monkeypatch):
    spoil(monkeypatch, "loss", {0})
    states, policy = States(), module(tiny_llama)
    fit(policy, tmp_path, states, steps=2, accumulate_grad_batches=2)
    assert policy.progress.updates_nonfinite == 1
    assert all(torch.equal(a, b) for a, b in zip(states.seen[0][0], states.seen[1][0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(states.seen[1][0], states.seen[3][0], strict=True))


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e39])
def test_a_reward_that_is_wrong_from_the_start_stops_the_run_at_once(tiny_llama, tmp_path, value):
    with pytest.raises(NonFiniteRewardError, match="must be finite"):
        fit(module(tiny_llama, EvenTokens(spoil={1}, value=value)), tmp_path)


def test_none_still_means_excluded(tiny_llama, tmp_path):
    policy = module(tiny_llama, EvenTokens(spoil={2}, value=None))
    fit(policy, tmp_path)
    assert policy.progress.updates_nonfinite == 0


def test_the_limit_must_be_positive(tiny_llama):
    with pytest.raises(ValueError, match="`max_nonfinite_updates` must be at least 1"):
        module(tiny_llama, max_nonfinite_updates=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e19, -2e19])
def test_gradients_whose_square_overflows_count_as_infinite(value):
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.ones(3), torch.tensor([1e18, -1e18])
    assert nonfinite_gradient(weights) == ""
    weights[1].grad[1] = value
    assert "1 of 2 parameters" in nonfinite_gradient(weights)
    assert nonfinite_gradient([]) == ""


def test_the_first_value_that_is_not_finite_is_named():
    fine, bad = torch.ones(3), torch.tensor([1.0, math.nan, math.inf])
    assert nonfinite_in({"a": fine, "b": torch.tensor(1.0)}) == ""
    assert nonfinite_in({"a": fine, "b": bad}) == "b: 2 of 3 not finite, the first nan"
    assert nonfinite_in({"loss": torch.tensor(-math.inf)}) == "loss: 1 of 1 not finite, the first -inf"
