"""RewardSet keeps TRL's protocol and turns every bad reward into one clear RewardError."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nspo_lightning.rewards import FunctionReward, RewardError, RewardSet
from nspo_lightning.rewards.trainer_state import _NOT_GIVEN, TrainerState

PROMPTS = ["p0", "p1", "p2"]
COMPLETIONS = ["a", "bb", "ccc"]


def length_reward(completions, **kwargs):
    return [float(len(c)) for c in completions]


async def async_reward(prompts, completions, answer):
    await asyncio.sleep(0)
    return [None if a is None else float(a) for a in answer]


def test_weighted_sum_is_trls():
    rewards = RewardSet([length_reward, async_reward], weights=[1.0, 0.5])
    result = rewards(PROMPTS, COMPLETIONS, {"answer": [10, None, -4]})
    # By hand: 1 + 0.5 * 10; 2 alone (None adds nothing); 3 - 0.5 * 4.
    assert result.total.tolist() == [6.0, 2.0, 1.0]
    assert result.per_reward["length_reward"].tolist() == [1.0, 2.0, 3.0]
    assert result.per_reward["async_reward"].isnan().tolist() == [False, True, False]


def test_matches_the_trl_trainers_arithmetic():
    torch.manual_seed(0)
    table = torch.randn(3, 5)
    table[torch.rand(3, 5) < 0.4] = math.nan
    table[:, 2] = math.nan
    columns = [[None if math.isnan(x) else x for x in row] for row in table.tolist()]
    weights = [0.3, -1.0, 2.0]
    rewards: dict[str, Any] = {
        f"r{i}": functools.partial(lambda row, **kw: row, column) for i, column in enumerate(columns)
    }
    total = RewardSet(rewards, weights=weights)(["p"] * 5, ["c"] * 5).total
    # grpo_trainer.py of TRL 1.x: (rewards_per_func * weights).nansum(dim=1), all-NaN rows set back to NaN.
    expected = (table.T * torch.tensor(weights)).nansum(dim=1)
    expected[table.T.isnan().all(dim=1)] = math.nan
    torch.testing.assert_close(total, expected, equal_nan=True)


def test_sample_without_any_score_is_excluded_not_zero():
    result = RewardSet([lambda completions, **kw: [None, 0.0, None]])(PROMPTS, COMPLETIONS)
    assert result.excluded.tolist() == [True, False, True]
    assert math.isnan(result.total[0])
    assert result.total[1] == 0.0


def test_statistics_leave_excluded_samples_out():
    result = RewardSet({
        "a": lambda **kw: [1.0, None, 3.0],
        "b": lambda **kw: [None] * 3,
        "c": lambda **kw: [None, 5, None],
    })(PROMPTS, COMPLETIONS)
    stats = result.statistics()
    assert stats["rewards/a/mean"] == 2.0
    assert stats["rewards/a/std"] == pytest.approx(math.sqrt(2))  # Bessel: ((1)^2 + (1)^2) / (2 - 1)
    assert math.isnan(stats["rewards/b/mean"])
    assert (stats["rewards/c/mean"], stats["rewards/c/std"]) == (5.0, 0.0)


class ChattyReward:
    def __call__(self, prompts, completions, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
        log_extra("upper", [c.upper() for c in completions])
        log_metric("chatty/step", trainer_state.global_step)
        return [0.0] * len(prompts)


def test_trls_extra_arguments_reach_the_reward():
    result = RewardSet([ChattyReward()])(PROMPTS, COMPLETIONS, trainer_state=TrainerState(global_step=7))
    assert result.extra == {"upper": ["A", "BB", "CCC"]}
    assert result.metrics == {"chatty/step": 7.0}
    assert list(result.per_reward) == ["chatty_reward"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trainer_state", r"needs the argument 'trainer_state', which says where training is.*`trainer_state=None`"),
        ("environments", r"needs the argument 'environments', which TRL gives to agents alone"),
        ("completion_ids", r"needs the argument 'completion_ids', and a file of texts has no token ids"),
        ("level", r"needs the argument 'level', but the batch has only completions"),
    ],
)
def test_an_argument_that_cant_be_given_is_refused_by_its_name(name, reason):
    source: dict[str, Any] = {}
    exec(f"def needs(prompts, completions, {name}, **_): return [0.0] * len(completions)", source)
    with pytest.raises(RewardError, match=reason):
        RewardSet([source["needs"]])(PROMPTS, COMPLETIONS)


def test_what_trls_state_has_and_ours_not_is_refused_with_the_reason():
    def curriculum(prompts, completions, trainer_state):
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    def remembers(prompts, completions, trainer_state):
        return [entry["loss"] for entry in trainer_state.log_history] or [0.0] * len(completions)

    state = TrainerState(global_step=2, max_steps=8, epoch=None)
    assert RewardSet([curriculum])(PROMPTS, COMPLETIONS, trainer_state=state).total.tolist() == [0.25] * 3
    with pytest.raises(RewardError, match=r"`trainer_state.log_history` is kept by transformers' Trainer"):
        RewardSet([remembers])(PROMPTS, COMPLETIONS, trainer_state=state)
    with pytest.raises(RewardError, match=r"`trainer_state.max_steps` is not known: training has no end"):
        RewardSet([curriculum])(PROMPTS, COMPLETIONS, trainer_state=TrainerState(global_step=2))
    with pytest.raises(AttributeError, match=r"is not there; there are global_step, max_steps"):
        _ = state.gobal_step
    assert {field.name for field in dataclasses.fields(transformers.TrainerState)} <= {
        *vars(state),
        *TrainerState.__annotations__,
        *_NOT_GIVEN,
    }, "every name of transformers' class is given or has its reason"


def test_trls_own_rewards_work_unchanged():
    trl_rewards = pytest.importorskip("trl.rewards")
    prompts = [[{"role": "user", "content": "q"}]] * 2
    texts = ["<think>\nhm\n</think>\nyes", "no thought"]
    overlong = trl_rewards.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=5)
    rewards = RewardSet([trl_rewards.think_format_reward, overlong])
    result = rewards(prompts, texts, completion_ids=[[1] * 3, [1] * 8])
    assert result.per_reward["think_format_reward"].tolist() == [1.0, 0.0]
    # (max - cache - length) / cache = (10 - 5 - 8) / 5
    assert list(result.per_reward.values())[1].tolist() == pytest.approx([0.0, -0.6])


SYSTEM = {"role": "system", "content": "be kind"}
CHATS: list[Any] = ["plain", [{"role": "user", "content": "chat"}], [SYSTEM, {"role": "user", "content": "asked"}]]


class Spy:
    """Notes what it is called with."""

    def __call__(self, prompts, completions, **columns):
        self.prompts, self.completions = prompts, completions
        return [0.0] * len(prompts)


class AskingSpy(Spy):
    messages = True


class AnnotatedSpy(Spy):
    def __call__(self, prompts, completions: list[list[dict[str, str]]], **columns):
        return super().__call__(prompts, completions)


def test_a_reward_gets_text_though_the_prompts_are_chats():
    spy = Spy()
    RewardSet([spy])(CHATS, ["x", "y", [{"role": "assistant", "content": "z"}]])
    assert spy.prompts == ["plain", "chat", "asked"]
    assert spy.completions == ["x", "y", "z"]


@pytest.mark.parametrize("spy", [AskingSpy(), AnnotatedSpy()])
def test_a_reward_that_asks_for_messages_gets_chats_as_chats(spy):
    RewardSet([Spy(), spy], names=["text", "chats"])(CHATS, ["x", "y", "z"])
    assert spy.prompts == CHATS
    chats = [[{"role": "assistant", "content": text}] for text in "yz"]
    assert spy.completions == ["x", *chats]


def of_messages(prompts, completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


def test_a_function_of_messages_says_so_in_the_config_and_is_told_how():
    path = f"{__name__}.of_messages"
    assert RewardSet([FunctionReward(path, messages=True)])(CHATS[1:], ["abc", "de"]).total.tolist() == [3, 2]
    with pytest.raises(RewardError, match="come as text.*`messages: true` of FunctionReward"):
        RewardSet([FunctionReward(path)])(CHATS[1:], ["abc", "de"])


def test_only_named_arguments_are_passed():
    def narrow(completions, level):
        return [float(x) for x in level]

    assert RewardSet([narrow])(PROMPTS, COMPLETIONS, {"level": [1, 2, 3], "other": [0, 0, 0]}).total.tolist() == [
        1,
        2,
        3,
    ]


def test_async_rewards_run_at_the_same_time_and_while_sync_ones_work():
    # Each of the three waits for the other two: done one after another, none could ever pass.
    barrier = threading.Barrier(2, timeout=5)
    flags = [asyncio.Event(), asyncio.Event()]

    async def meets(mine, other, completions, **kwargs):
        flags[mine].set()
        await asyncio.wait_for(flags[other].wait(), 5)
        await asyncio.to_thread(barrier.wait) if mine == 0 else None
        return [1.0] * len(completions)

    def sync(completions, **kwargs):
        barrier.wait()
        return [1.0] * len(completions)

    rewards: dict[str, Any] = {"a": functools.partial(meets, 0, 1), "b": functools.partial(meets, 1, 0), "c": sync}
    assert RewardSet(rewards, timeout_s=10)(PROMPTS, COMPLETIONS).total.tolist() == [3.0, 3.0, 3.0]


def test_async_rewards_work_inside_a_running_loop():
    async def main():
        return RewardSet([async_reward])(PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]}).total.tolist()

    assert asyncio.run(main()) == [1.0, 2.0, 3.0]


class AsyncCall:
    async def __call__(self, completions, **kwargs):
        return [4.0] * len(completions)


@pytest.mark.parametrize(
    "reward",
    [
        AsyncCall(),
        functools.partial(async_reward, answer=[4, 4, 4]),
        lambda completions, **kw: AsyncCall()(completions),
    ],
    ids=["instance", "partial", "lambda"],
)
def test_every_form_of_async_reward_is_awaited(reward):
    assert RewardSet({"r": reward})(PROMPTS, COMPLETIONS).total.tolist() == [4.0] * 3


@pytest.mark.parametrize(
    "returned",
    [
        (1, True, None),
        np.array([1.0, 1.0, 0.0]),
        torch.tensor([1.0, 1.0, 2.0]),
        [np.float32(1), torch.tensor(1.0), 3],
        [np.bool_(True), np.array(1), np.int64(3)],
        [np.array([1.0]), torch.tensor([True]), None],
        np.array([np.bool_(True), 1, None], dtype=object),
    ],
)
def test_sequences_of_numbers_are_accepted(returned):
    assert RewardSet({"r": lambda **kw: returned})(PROMPTS, COMPLETIONS).total[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, float("nan"), 0.0], r"Reward 'bad' returned nan for sample 1.*Return None"),
        ([1.0, 1.0, float("inf")], r"Reward 'bad' returned inf for sample 2"),
        (torch.tensor([1.0, 1.0, float("nan")]), r"returned nan for sample 2"),
        ([1.0], r"Reward 'bad' must return 3 numbers.*got 1\..*None"),
        ([1.0] * 4, r"must return 3 numbers.*got 4\."),
        (None, r"must return a list of 3 numbers.*got None of type NoneType"),
        (0.5, r"got 0.5 of type float"),
        (torch.tensor(0.5), r"got 1\."),
        ("yes", r"got 'yes' of type str"),
        ({"a": 1}, r"of type dict"),
        ([1.0, "0.5", 0.0], r"sample 1 got '0.5' of type str.*float\(\)"),
        ([[1.0], [1.0], [1.0]], r"sample 0 got \[1.0\] of type list"),
        ([1.0, 1j, 0.0], r"of type complex"),
        ([1.0, np.complex64(1j), 0.0], r"of type complex"),
        ([1.0, np.str_("1"), 0.0], r"of type str"),
        ([1.0, np.datetime64("2020-01-01"), 0.0], r"of type date"),
        ([1.0, np.bool_(False), np.float32("nan")], r"returned nan for sample 2"),
        ([1.0, np.array([1.0, 2.0]), 0.0], r"of type ndarray"),
    ],
)
def test_bad_return_values_name_the_reward_the_fact_and_the_cure(returned, message):
    with pytest.raises(RewardError, match=message) as caught:
        RewardSet({"bad": lambda **kw: returned})(PROMPTS, COMPLETIONS)
    assert caught.value.reward == "bad"
    assert "\n" not in str(caught.value)


def _raises(error):
    def reward(**kwargs):
        raise error

    return reward


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), TimeoutError("inner"), SystemExit("bye")])
def test_raising_reward(error):
    with pytest.raises(
        RewardError, match=rf"Reward 'bad' raised {type(error).__name__} on a batch of 3.*{error}"
    ) as caught:
        RewardSet({"bad": _raises(error)})(PROMPTS, COMPLETIONS)
    assert caught.value.__cause__ is error


def test_raising_async_reward():
    async def bad(completions, **kwargs):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="Reward 'bad' raised KeyError") as caught:
        RewardSet([bad, length_reward])(PROMPTS, COMPLETIONS)
    assert 'raise KeyError("answer")' in str(caught.value)


def divide(value):
    return value / 0  # here


@pytest.mark.parametrize("timeout_s", [5.0, None])
def test_where_a_reward_raised_is_told_and_not_who_called_it(timeout_s):
    with pytest.raises(RewardError) as caught:
        RewardSet({"bad": lambda **kw: [divide(1)] * 3}, timeout_s=timeout_s)(PROMPTS, COMPLETIONS)
    told = str(caught.value)
    assert "value / 0  # here" in told
    assert "in divide" in told
    assert "runner.py" not in told
    assert "compose.py" not in told
    assert len(told.splitlines()) < 15


def test_keyboard_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        RewardSet({"bad": _raises(KeyboardInterrupt())})(PROMPTS, COMPLETIONS)


def test_hanging_sync_reward_ends_and_the_set_stays_usable():
    release = threading.Event()
    hang = [True]

    def bad(completions, **kwargs):
        if hang[0]:
            release.wait(30)
        return [1.0] * len(completions)

    rewards = RewardSet([bad], timeout_s=0.2)
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"'bad' took longer than `timeout_s` = 0.2 s.*given up"):
        rewards(PROMPTS, COMPLETIONS)
    assert time.perf_counter() - start < 5
    hang[0] = False
    assert rewards(PROMPTS, COMPLETIONS).total.tolist() == [1.0] * 3
    release.set()


def test_hanging_async_reward_is_cancelled():
    cancelled = threading.Event()

    async def bad(completions, **kwargs):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(RewardError, match="took longer"):
        RewardSet([bad], timeout_s=0.2)(PROMPTS, COMPLETIONS)
    assert cancelled.wait(5)


def test_failure_cancels_the_async_rewards_still_under_way():
    cancelled = threading.Event()

    async def slow(completions, **kwargs):
        try:
            await asyncio.sleep(30)
        finally:
            cancelled.set()

    with pytest.raises(RewardError, match="Reward 'bad'"):
        RewardSet({"slow": slow, "bad": _raises(ValueError("x"))})(PROMPTS, COMPLETIONS)
    assert cancelled.wait(5)


def test_rewards_run_without_autograd_and_off_the_main_thread_only_with_a_timeout():
    seen = []

    def reward(completions, **kwargs):
        seen.append((torch.is_grad_enabled(), threading.current_thread() is threading.main_thread()))
        return [0.0] * len(completions)

    RewardSet([reward], timeout_s=5)(PROMPTS, COMPLETIONS)
    RewardSet([reward], timeout_s=None)(PROMPTS, COMPLETIONS)
    assert seen == [(False, False), (False, True)]


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        (lambda completions, answer: [0.0], {"level": [1, 2, 3]}, r"needs the argument 'answer'.*level"),
        (lambda completions, /, **kw: [0.0], {}, r"by keyword.*'completions' is positional only"),
        (length_reward, {"answer": [1]}, r"'answer' has 1 for 3 completions.*group_size"),
    ],
)
def test_arguments_that_do_not_fit(reward, columns, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([reward])(PROMPTS, COMPLETIONS, columns)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rewards": []}, ValueError, "at least one reward"),
        ({"rewards": [3]}, TypeError, "callable.*got int"),
        ({"rewards": [length_reward], "weights": [1.0, 2.0]}, ValueError, "each of the 1 rewards, got 2"),
        ({"rewards": [length_reward], "weights": [float("nan")]}, ValueError, "finite"),
        ({"rewards": [length_reward, length_reward]}, ValueError, "length_reward more than once.*`names`"),
        ({"rewards": [length_reward], "names": ["a", "b"]}, ValueError, "each of the 1 rewards, got 2"),
        ({"rewards": {"a": length_reward}, "names": ["b"]}, ValueError, "one of the two"),
        ({"rewards": [length_reward], "timeout_s": 0}, ValueError, "`timeout_s` must be positive"),
        ({"rewards": ["no_such_module.reward"]}, ValueError, "no module 'no_such_module'"),
        ({"rewards": ["math.no_such_name"]}, ValueError, "'math' has no 'no_such_name'"),
        ({"rewards": ["math.pi"]}, TypeError, "must name a callable, got float"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RewardSet(**arguments)


def test_function_by_path_takes_fixed_arguments():
    assert FunctionReward("math.fsum").name == "fsum"
    with pytest.raises(RewardError, match="needs the argument 'answer'"):
        RewardSet({"r": FunctionReward(f"{__name__}.async_reward")})(PROMPTS, COMPLETIONS)
    fixed = FunctionReward(f"{__name__}.async_reward", name="fixed", kwargs={"answer": [1, 2, 3]})
    assert RewardSet([fixed])(PROMPTS, COMPLETIONS).per_reward["fixed"].tolist() == [1.0, 2.0, 3.0]


def test_set_can_be_pickled_after_use():
    rewards = RewardSet([length_reward])
    rewards(PROMPTS, COMPLETIONS)
    assert pickle.loads(pickle.dumps(rewards))(PROMPTS, COMPLETIONS).total.tolist() == [1.0, 2.0, 3.0]


def test_close_ends_the_threads():
    rewards = RewardSet([length_reward, async_reward])
    before = threading.active_count()
    rewards(PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]})
    assert threading.active_count() == before + 2
    rewards.close()
    deadline = time.perf_counter() + 5
    while threading.active_count() > before and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
