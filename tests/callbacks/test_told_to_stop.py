"""A signal ends whatever measures within a batch, on all ranks, and the run that goes on ends where it would have."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny_jobs import adapter, even_tokens, general, harmful, module, trainer
from two_processes import spawn

from nspo_lightning.callbacks import CapabilityGuard, LastCheckpoint, NullSpaceProjection, RunReport
from nspo_lightning.callbacks.batch_rows import measuring
from nspo_lightning.cli.standard_callbacks import with_standard_callbacks
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.rewards import RulesJudge

BATCHES = 2
"""Of general validation text."""


def data(**changes: Any) -> AlignmentDataModule:
    settings: dict[str, Any] = {"batch_size": 2, "val_size": 2, "test_size": 2, "eval_batch_size": 1} | changes
    return AlignmentDataModule(PromptSource(rows=harmful), PromptSource(rows=general), **settings)


class Signals:
    """Sends this process SIGTERM in the `at`-th call of a method, and counts calls; 0 = never."""

    def __init__(self, owner: Any, name: str, at: int) -> None:
        self.calls, self._at, self._real = 0, at, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._real(*args, **kwargs)


def job(model: Path, folder: Path, *given: Callback, evaluate: bool = False, **options: Any) -> Any:
    """A module, and a Trainer with the callbacks of the command line."""
    pl.seed_everything(0, verbose=False)
    folder.mkdir(exist_ok=True)
    report = RunReport(folder=str(folder), evaluate=evaluate)
    callbacks = with_standard_callbacks([*given, report], checkpoints=True, progress_bar=False)
    settings: dict[str, Any] = {"steps": 5, "enable_checkpointing": True, "num_sanity_val_steps": 0} | options
    policy = module(model, reward=settings.pop("reward", even_tokens), judge=RulesJudge())
    return policy, trainer(folder, callbacks=callbacks, **settings)


def last_of(run: pl.Trainer) -> Path:
    callbacks: list[Callback] = run.callbacks  # type: ignore[attr-defined]
    path = next(callback.path for callback in callbacks if isinstance(callback, LastCheckpoint))
    assert path is not None
    return path


def ended(run: Any, policy: pl.LightningModule, rows: AlignmentDataModule, **options: Any) -> int | None:
    """Fit until SIGTERM ends it; return the last checkpoint's step, None without one."""
    with pytest.raises(SIGTERMException) as found:
        run.fit(policy, rows, **options)
    assert found.value.code == 128 + signal.SIGTERM
    last = last_of(run)
    return int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else None


@pytest.mark.parametrize(
    ("at", "saved", "left", "steps"),
    [
        pytest.param(BATCHES + 1, 2, 3 * BATCHES, [2, 4, 5], id="after an update"),
        pytest.param(3 * BATCHES + 1, 5, BATCHES, [5], id="at the end"),
    ],
)
def test_a_guards_measurement_ends_within_a_batch_and_is_made_by_the_run_that_goes_on(
    at: int, saved: int, left: int, steps: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    def guarded(name: str) -> Any:
        return job(tiny_llama, tmp_path / name, CapabilityGuard(max_kl=9.0, every_n_updates=2))

    whole, run = guarded("whole")
    run.fit(whole, data())
    cut, stopped = guarded("cut")
    seen = Signals(cut, "text_scores", at)
    assert ended(stopped, cut, data()) == saved
    assert seen.calls == at
    resumed, run = guarded("cut")
    seen = Signals(resumed, "text_scores", 0)
    run.fit(resumed, data(), ckpt_path=last_of(stopped))
    guard = next(callback for callback in run.callbacks if isinstance(callback, CapabilityGuard))
    assert [reading.step for reading in guard.readings] == steps
    assert seen.calls == left
    assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(whole).items())


def test_a_guards_measurement_at_a_validation_is_made_again_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    def guarded(name: str) -> Any:
        options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2, "steps": 3}
        return job(tiny_llama, tmp_path / name, CapabilityGuard(max_kl=9.0, every_n_updates=99), **options)

    whole, run = guarded("whole")
    run.fit(whole, data())
    cut, stopped = guarded("cut")
    seen = Signals(cut, "text_scores", BATCHES + 1)
    assert ended(stopped, cut, data()) == 2
    assert seen.calls == BATCHES + 1
    resumed, run = guarded("cut")
    seen = Signals(resumed, "text_scores", 0)
    run.fit(resumed, data(), ckpt_path=last_of(stopped))
    assert seen.calls == 3 * BATCHES, "the guard's and the validation's own, and the guard's at the end"
    assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(whole).items())


def test_a_last_check_that_a_signal_cut_off_still_takes_weights_over_budget_back(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def guarded() -> Any:
        return job(tiny_llama, tmp_path, CapabilityGuard(max_kl=1e-12, every_n_updates=99), steps=3)

    cut, stopped = guarded()
    Signals(cut, "text_scores", BATCHES + 1)
    assert ended(stopped, cut, data()) == 3
    resumed, run = guarded()
    run.fit(resumed, data(), ckpt_path=last_of(stopped))
    weights = torch.load(last_of(run), weights_only=True)["state_dict"]
    trained = [name for name in adapter(resumed) if "lora_B" in name]
    assert trained
    assert not any(adapter(resumed)[name].any() or weights[name].any() for name in trained)


@pytest.mark.parametrize("when", ["before", "after"])
def test_measuring_before_and_after_training_ends_within_a_batch(
    when: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, run = job(tiny_llama, tmp_path, evaluate=True, steps=2)
    policy.configure_model()
    of_a_measurement = 4  # two harmful prompts and two general ones, one a batch
    at = 2 if when == "before" else of_a_measurement + 2
    seen = Signals(policy.evaluator, "answer", at)
    saved = ended(run, policy, data())
    assert seen.calls == at
    assert saved == (None if when == "before" else 2)
    assert not (tmp_path / "summary.json").exists()
    if when == "after":
        assert "has the end of the training" in caplog.text
        resumed, again = job(tiny_llama, tmp_path, evaluate=True, steps=2)
        again.fit(resumed, data(), ckpt_path=last_of(run))
        assert json.loads((tmp_path / "summary.json").read_text())["updates"] == 2


@pytest.mark.parametrize("handled", [True, False], ids=["ours", "Lightning's"])
@pytest.mark.parametrize("what", ["answers", "passes"])
def test_a_calibration_ends_within_a_batch(what: str, handled: bool, tiny_llama: Path, tmp_path: Path) -> None:
    policy, run = job(tiny_llama, tmp_path, NullSpaceProjection(criterion="rank", threshold=0.5))
    if not handled:
        run = trainer(tmp_path, callbacks=[NullSpaceProjection(criterion="rank", threshold=0.5)])
    text = "prompt_and_model_answer" if what == "answers" else "prompt_and_answer"
    rows = data(calibration_text=text, calibration_batch_size=1)
    seen = Signals(policy, "calibration_answers" if what == "answers" else "calibration_forward", 2)
    with pytest.raises(SIGTERMException) as found:
        run.fit(policy, rows)
    assert (seen.calls, found.value.code) == (2, 143)
    assert run.global_step == 0


def telling(at: int) -> Any:
    """Make a reward in whose `at`-th call SIGTERM comes; 0 = never."""
    calls = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return even_tokens(prompts, completions, completion_ids)

    return reward


def test_a_signal_while_a_reward_is_asked_is_not_the_rewards_fault(tiny_llama: Path, tmp_path: Path) -> None:
    policy, run = job(tiny_llama, tmp_path, reward=telling(3))
    assert ended(run, policy, data()) == 2


def test_test_ends_at_once_and_leaves_no_result(tiny_llama: Path, tmp_path: Path) -> None:
    policy, run = job(tiny_llama, tmp_path)
    policy.configure_model()
    seen = Signals(policy.evaluator, "answer", 2)
    with pytest.raises(SIGTERMException) as found:
        run.test(policy, data(), verbose=False)
    assert (seen.calls, found.value.code) == (2, 143)
    assert not (tmp_path / "test.json").exists()


class TellsAgain(Callback):
    """Sends a second SIGTERM while the first one's exception is on its way."""

    def on_exception(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_sigterm_does_not_come_between_the_first_and_its_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    policy, run = job(tiny_llama, tmp_path, TellsAgain(), reward=telling(3))
    assert ended(run, policy, data()) == 2


@pytest.mark.parametrize("how", ["finished", "failed", "stopped"])
def test_handlers_are_as_they_were_when_a_run_is_over(how: str, tiny_llama: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("planted")

    rewards = {"finished": telling(0), "failed": fails, "stopped": telling(2)}
    policy, run = job(tiny_llama, tmp_path, steps=2, reward=rewards[how])
    try:
        run.fit(policy, data())
    except (SIGTERMException, Exception):
        assert how != "finished"
    assert [signal.getsignal(number) for number in numbers] == before


def uneven(rank: int, folder: Path) -> Any:
    """Measure three batches on one rank and one on the other, which hears a signal, or nobody does."""
    ends = []
    for told in (None, 0, 1):
        trainer: Any = SimpleNamespace(callbacks=[], progress_bar_callback=None, received_sigterm=False)
        seen = 0
        try:
            with measuring(trainer, "Measuring", [range(3 if rank == 0 else 1)]) as [batches]:
                for _ in batches:
                    seen += 1
                    trainer.received_sigterm = told == rank
        except SIGTERMException:
            ends.append((seen, "stopped"))
        else:
            ends.append((seen, "whole"))
    return ends


def test_ranks_with_different_numbers_of_batches_stop_together(tmp_path: Path) -> None:
    first, second = spawn(uneven, tmp_path, forked=True)
    assert first == [(3, "whole"), (1, "stopped"), (1, "stopped")]
    assert second == [(1, "whole"), (1, "stopped"), (1, "stopped")]
