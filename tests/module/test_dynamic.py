"""Dynamic sampling: groups without a signal are replaced from the data, exactly, and resumed to the bit."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_rollouts import Prompt, dynamic, gradients, gradients_of_loader, known_loader, still_policy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny_jobs import Recorder, adapter, datamodule, even_tokens, module, trainer

from nspo_lightning.callbacks import ExactResume
from nspo_lightning.compat.lightning import logging_step
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.dynamic import DynamicSampling, chosen_groups, further_prompts
from nspo_lightning.module.resumed_settings import ResumeError
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.rollout.server_config import ServerSettings

FLAT: dict[str, Any] = {"rewards": (1.0, 1.0)}
CUT: dict[str, Any] = {"cut": (True, True)}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for update, values in expected.items():
        for name, value in values.items():
            torch.testing.assert_close(found[update][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_gradient_is_that_of_the_groups_with_a_signal(tiny_llama, tmp_path, loss_type, accumulate):
    choose = random.Random(3)
    kinds = [choose.choice([{}, FLAT, CUT]) for _ in range(40)]
    prompts = [Prompt(i, lengths=(choose.randint(1, 5), choose.randint(1, 5)), **kind) for i, kind in enumerate(kinds)]
    found, steps = gradients_of_loader(
        dynamic(still_policy(tiny_llama, loss_type), 20),
        tmp_path,
        known_loader(prompts),
        accumulate,
        limit_train_batches=4,
    )
    learns = [prompt for prompt, kind in zip(prompts, kinds, strict=True) if not kind]
    batches = [learns[2 * i : 2 * i + 2] for i in range(4)]
    assert_same_gradients(found, gradients(still_policy(tiny_llama, loss_type), tmp_path, batches, accumulate))
    assert {step["dynamic/groups_kept"] for step in steps} == {2.0}
    used = sum(step["dynamic/prompts"] for step in steps)
    assert used == prompts.index(learns[7]) + 1, "not one prompt more than needed"
    assert all(step["dynamic/factor"] == step["dynamic/prompts"] / 2 for step in steps)
    assert all(step["dynamic/completions"] == 2 * step["dynamic/prompts"] for step in steps)


def test_a_limit_that_is_reached_leaves_groups_without_a_signal_in_the_batch(tiny_llama, tmp_path):
    prompts = [Prompt(i, **({} if i in {3, 8} else FLAT)) for i in range(12)]
    found, steps = gradients_of_loader(
        dynamic(still_policy(tiny_llama, "grpo")), tmp_path, known_loader(prompts), limit_train_batches=3
    )
    first, second = [prompts[0], prompts[3]], [prompts[6], prompts[8]]
    expected = gradients(still_policy(tiny_llama, "grpo"), tmp_path, [first, second, first])
    assert_same_gradients(found, expected)
    assert [step["dynamic/prompts"] for step in steps] == [6, 6, 6]
    assert [step["dynamic/groups_kept"] for step in steps] == [1, 1, 1]  # the third batch begins anew with prompt 0
    assert steps[0]["dynamic/without_signal"] == pytest.approx(5 / 6)
    assert steps[0]["reward"] == pytest.approx(11 / 12), "of all that was drawn"
    assert steps[0]["dynamic/reward_kept"] == pytest.approx(3 / 4)
    assert steps[0]["frac_reward_zero_std"] == pytest.approx(5 / 6)


def test_a_batch_takes_no_prompt_twice_when_the_data_run_out(tiny_llama, tmp_path):
    prompts = [Prompt(i, **({} if i == 3 else FLAT)) for i in range(5)]
    found, steps = gradients_of_loader(
        dynamic(still_policy(tiny_llama, "grpo"), 4), tmp_path, known_loader(prompts), limit_train_batches=2
    )
    filled = [[prompts[0], prompts[3]]] * 2  # in order: 0 1, 2 3, 4; and again, from the second pass
    assert_same_gradients(found, gradients(still_policy(tiny_llama, "grpo"), tmp_path, filled))
    assert [step["dynamic/prompts"] for step in steps] == [5, 5]
    assert [step["dynamic/rounds"] for step in steps] == [3, 3]
    assert [step["dynamic/without_signal"] for step in steps] == pytest.approx([4 / 5, 4 / 5])
    assert [step["dynamic/groups_kept"] for step in steps] == [1, 1]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 3))
def test_what_is_chosen_has_a_signal_unless_there_are_too_few(found, world_size):
    signals = [torch.tensor(one * world_size) for one in found]
    wanted = signals[0].numel()
    chosen = chosen_groups(signals, wanted, world_size)
    flat = [signals[one.round].view(world_size, -1)[one.rank, one.prompt] for one in chosen]
    with_signal = sum(int(one.sum()) for one in signals)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == wanted, "on any number of ranks: each update weighs as much as another"
    assert sum(map(bool, flat)) == min(wanted, with_signal)
    assert chosen == sorted(chosen)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(2, 5), st.data())
def test_no_more_is_drawn_than_is_missing_and_never_over_the_limit(each, world_size, factor, data):
    wanted = drawn = each * world_size
    found = data.draw(st.integers(0, wanted))
    while number := further_prompts(wanted, found, drawn, factor, world_size):
        assert number * world_size < wanted - found + world_size
        drawn += number * world_size
        found += data.draw(st.integers(0, number * world_size))
    assert drawn <= factor * wanted
    assert found >= wanted or drawn > factor * wanted - world_size


class SavesWhereItEnds(Callback):
    """As a signal would."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


class SomeAlike:
    """No signal for the prompts with an `e` in their word, and an error at a call."""

    name = "some_alike"

    def __init__(self, fail_at=0):
        self.fail_at, self.calls = fail_at, []

    def __call__(self, prompts, completions, completion_ids, **_):
        self.calls.append(prompts[::4])
        if len(self.calls) == self.fail_at:
            raise RuntimeError("the plug was pulled")
        scores = even_tokens(prompts, completions, completion_ids)
        return [0.0 if "e" in prompt.split()[-1] else score for prompt, score in zip(prompts, scores, strict=True)]


@pytest.mark.parametrize(("repeat", "fail_at"), [(1, 6), (2, 7)])
def test_a_run_that_was_killed_in_a_rollout_goes_on_to_the_same_bits(tiny_llama, tmp_path, repeat, fail_at):
    options = {"num_iterations": repeat, "dynamic_sampling": DynamicSampling(max_factor=4)}
    windows = {"steps": 4 * repeat, "accumulate_grad_batches": repeat}

    def fit(reward, path=None):
        policy, recorder = module(tiny_llama, reward=reward, **options), Recorder()
        callbacks = [ExactResume(), recorder, SavesWhereItEnds(tmp_path / "killed.ckpt")]
        run = trainer(tmp_path, callbacks=callbacks, **windows)
        run.fit(policy, datamodule(repeat_batches=repeat), ckpt_path=path)
        return policy, recorder.steps

    torch.manual_seed(7)
    whole, of_whole = SomeAlike(), None
    policy, of_whole = fit(whole)
    assert max(step["dynamic/rounds"] for step in of_whole) > 1
    torch.manual_seed(7)
    first = SomeAlike(fail_at)
    with pytest.raises(ValueError, match="plug"):
        fit(first)
    rest = SomeAlike()
    again, of_rest = fit(rest, tmp_path / "killed.ckpt")
    assert rest.calls == whole.calls[-len(rest.calls) :]
    weights = adapter(policy)
    assert all(torch.equal(value, weights[name]) for name, value in adapter(again).items())
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    assert [step["reward"] for step in of_rest] == [step["reward"] for step in of_whole[-len(of_rest) :]]


@pytest.mark.parametrize("limit", [{"steps": -1, "max_epochs": 2}, {"steps": 8, "max_epochs": -1}])
def test_a_run_goes_on_from_the_end_of_an_epoch_to_the_same_bits(tiny_llama, tmp_path, limit):
    """The next epoch's prompts come behind those that the last one took, wherever Lightning begins."""

    def fit(path=None):
        torch.manual_seed(7)
        options = {"num_iterations": 2, "dynamic_sampling": DynamicSampling(max_factor=2)}
        reward, recorder = SomeAlike(), Recorder()
        policy = module(tiny_llama, reward=reward, **options)
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        validates = {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        settings = {"limit_train_batches": 4, "enable_checkpointing": True, **validates, **limit}
        run = trainer(tmp_path, callbacks=[ExactResume(), recorder, saved], **settings)
        run.fit(policy, datamodule(repeat_batches=2), ckpt_path=path)
        return adapter(policy), recorder.steps, reward.calls, logging_step(run)

    weights, steps, calls, logged = fit()
    assert max(step["dynamic/rounds"] for step in steps) > 1
    again, rest, asked, logged_again = fit(tmp_path / "epoch=0.ckpt")
    assert asked == calls[-len(asked) :]
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert [step["reward"] for step in rest] == [step["reward"] for step in steps[4:]]
    assert logged_again == logged == 8


def test_what_can_not_be_is_refused(tiny_llama, tmp_path):
    settings: TrainingSettings = module(tiny_llama).settings
    server = ServerSettings(base_url="http://localhost:1", model="m", adapter_folder="shelf", overlap=True)
    with pytest.raises(ValueError, match="`dynamic_sampling` and `rollout_server.overlap`"):
        replace(settings, rollout_server=server, dynamic_sampling=DynamicSampling())
    with pytest.raises(ValueError, match=r"`dynamic_sampling.max_factor` must be at least 2, got 1"):
        DynamicSampling(max_factor=1)
    policy = dynamic(still_policy(tiny_llama, "grpo"))
    with pytest.raises(MisconfigurationException, match="Batches gives none"):
        gradients(policy, tmp_path, [[Prompt(0)]])
    plain = module(tiny_llama)
    run = trainer(tmp_path, steps=1)
    run.fit(plain, datamodule())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ResumeError, match=r"`model.dynamic_sampling.max_factor` null -> 4"):
        trainer(tmp_path, steps=2).fit(
            module(tiny_llama, dynamic_sampling=DynamicSampling()), datamodule(), ckpt_path=tmp_path / "plain.ckpt"
        )


def test_rollouts_of_other_widths_are_put_together_without_a_change():
    def rollout(prompt, completion):
        ids = torch.arange(2 * completion).view(2, completion) + 10
        return Rollout(
            prompt_ids=torch.arange(prompt)[None] + 1,
            prompt_mask=torch.ones(1, prompt, dtype=torch.bool),
            group_size=2,
            completion_ids=ids,
            completion_mask=torch.ones_like(ids, dtype=torch.bool),
            finished=torch.tensor([True, False]),
            log_probs=-ids.float(),
        )

    parts = [rollout(2, 3), rollout(4, 1)]
    both = Rollout.concat(parts)
    for i, part in enumerate(parts):
        one = both.select([i]).trim()
        for name, value in part.state_dict().items():
            assert torch.equal(vars(one)[name], value) if isinstance(value, torch.Tensor) else vars(one)[name] == value
