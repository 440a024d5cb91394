"""Decoding in shapes that stay, in eager mode and recorded and replayed, against decoding in shapes that follow."""

import copy
import warnings
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import EOS, SPOILS, assert_same, draw, spoil
from tiny_policies import SHARING, VOCABULARY, ragged_prompts, tiny_policy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nspo_lightning.compat.torch import NoDeviceWaits
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.parts import policy_parts
from nspo_lightning.policy.settings import PolicySettings
from nspo_lightning.rollout import SamplingConfig, graphs, loops, sampler
from nspo_lightning.rollout.choosing import NonFiniteLogitsError
from nspo_lightning.rollout.fixed_memory import FixedMemory
from nspo_lightning.rollout.graphs import decoding_for
from nspo_lightning.rollout.loops import StaticLoop
from nspo_lightning.rollout.memory import SharedMemory
from nspo_lightning.rollout.places import Places
from nspo_lightning.rollout.room import bytes_per_token

WINDOWED = ["qwen2-window", "mistral-window", "gemma2", "gemma3"]


@pytest.fixture(scope="module")
def llama():
    return tiny_policy()


def assert_near(a, b):
    """The same tokens, and their log-probabilities to float32 rounding."""
    state = [x.state_dict() for x in (a, b)]
    log_probs = [x.pop("log_probs") for x in state]
    for name, value in state[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[1][name])), name
    assert (log_probs[0] - log_probs[1]).abs().max() <= 1e-4


class Recorder(TorchDispatchMode):
    """What a graph keeps of a step: operations on tensors that are where they were. Python runs once."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # neither a view nor in place
                    old.copy_(new)


def tensors(thing):
    if isinstance(thing, torch.Tensor):
        return [thing]
    return [x for part in thing for x in tensors(part)] if isinstance(thing, (tuple, list)) else []


class ReplayedStep:
    """`CapturedStep` without a GPU: run, record, replay; stale numbers of Python's would come out as other tokens."""

    made = 0

    def __init__(self, step):
        self.step, self.recorder, self.warm = step, None, False
        ReplayedStep.made += 1

    def __call__(self):
        if not self.warm:
            self.warm = True
            self.step()
        elif self.recorder is None:
            self.recorder = Recorder()
            with self.recorder:
                self.step()
        else:
            self.recorder.replay()


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(loops, "LOOK_EVERY", 2)
    monkeypatch.setattr(loops, "FIRST_CAPACITY", 3)


def replayed(policy, **kwargs):
    with (
        patch.object(sampler, "decoding_for", lambda *_: "graphs"),
        patch.object(sampler, "CapturedIfPossible", ReplayedStep),
        patch.object(sampler, "GRAPHS_PAY_BACK", 0),
    ):
        return draw(policy, **kwargs)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("share", [True, False])
def test_every_architecture_draws_the_same_tokens(name, share):
    policy = tiny_policy(name)
    for temperature in (1.3, 0):
        plain = draw(policy, share, temperature=temperature, max_new_tokens=11, with_log_probs=True)
        static = draw(policy, share, temperature=temperature, max_new_tokens=11, with_log_probs=True, decoding="static")
        assert_near(static, plain)
        again = replayed(policy, share=share, temperature=temperature, max_new_tokens=11, with_log_probs=True)
        assert_near(again, plain)


def two_alike(completions):
    """Like a string across tokens: ends a completion whose last two tokens leave the same rest."""
    if completions.shape[1] < 2:
        return torch.zeros(len(completions), dtype=torch.bool)
    return completions[:, -1] % 5 == completions[:, -2] % 5


@pytest.mark.parametrize("look", [1, 3, 16])
def test_stops_are_found_at_the_next_look(llama, monkeypatch, look):
    monkeypatch.setattr(loops, "LOOK_EVERY", look)
    for eos in (EOS[:0], EOS):
        plain = draw(llama, eos=eos, max_new_tokens=30, stop=two_alike, with_log_probs=True)
        lengths = plain.completion_mask.sum(1)
        last = plain.completion_ids.gather(1, (lengths - 2).clamp(min=0)[:, None] + torch.arange(2))
        assert (last[:, 0] % 5 == last[:, 1] % 5).sum() > 2, "some end so"
        again = draw(llama, eos=eos, max_new_tokens=30, stop=two_alike, with_log_probs=True, decoding="static")
        assert_near(again, plain)


LLAMA, GEMMA = tiny_policy(), tiny_policy("gemma2")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_drawn_settings_draw_the_same_tokens(data):
    limit = data.draw(st.integers(1, 20), "limit")
    kwargs = {
        "share": data.draw(st.booleans(), "share"),
        "group": data.draw(st.integers(1, 9), "group"),
        "seed": data.draw(st.integers(0, 99), "seed"),
        "eos": data.draw(st.sampled_from([[], [5], EOS, list(range(40))]), "eos"),
        "max_new_tokens": limit,
        "min_new_tokens": data.draw(st.integers(0, limit), "min_new_tokens"),
        "temperature": data.draw(st.sampled_from([0, 0.7, 1, 1.3]), "temperature"),
        "top_k": data.draw(st.sampled_from([0, 7]), "top_k"),
        "top_p": data.draw(st.sampled_from([1.0, 0.8]), "top_p"),
        "min_p": data.draw(st.sampled_from([None, 0.05]), "min_p"),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.8]), "repetition_penalty"),
        "with_log_probs": True,
        "stop": data.draw(st.sampled_from([None, two_alike]), "stop"),
    }
    ids, mask = ragged_prompts()
    which = data.draw(st.sampled_from([[0], [0, 1, 2], [2, 0]]), "prompts")
    kwargs["prompts"] = ids[which], mask[which]
    sizes = {"LOOK_EVERY": data.draw(st.integers(1, 5), "look"), "FIRST_CAPACITY": data.draw(st.integers(1, 9), "room")}
    policy = data.draw(st.sampled_from([LLAMA, GEMMA]), "policy")
    plain = draw(policy, **kwargs)
    with patch.multiple(loops, **sizes):
        assert_near(draw(policy, decoding="static", **kwargs), plain)
        assert_near(replayed(policy, **kwargs), plain)


def test_noise_belongs_to_places(llama):
    ids, mask = ragged_prompts()
    everybody = draw(llama, decoding="static", max_new_tokens=12)
    part = sampler.sample(
        llama,
        ids[1:],
        mask[1:],
        group_size=4,
        config=SamplingConfig(max_new_tokens=12, temperature=1.3, decoding="static"),
        eos_token_ids=EOS,
        pad_token_id=0,
        generator=torch.Generator().manual_seed(1),
        prompt_places=Places(total=3, mine=(1, 2)),
    )
    assert_same(part.trim(), everybody.select([1, 2]).trim())


def buckets_entered(monkeypatch):
    entered: list[tuple[int, int]] = []

    def enter(self, *to, original=StaticLoop._enter):
        entered.append(to)
        original(self, *to)

    monkeypatch.setattr(StaticLoop, "_enter", enter)
    return entered


def test_buckets_halve_and_buffers_grow(llama, monkeypatch):
    entered = buckets_entered(monkeypatch)
    for way in ("static", "replayed"):
        entered.clear()
        ReplayedStep.made = 0
        many = {"group": 8, "max_new_tokens": 40, "min_new_tokens": 3, "with_log_probs": True}
        rollout = draw(llama, decoding="static", **many) if way == "static" else replayed(llama, **many)
        assert_near(rollout, draw(llama, **many))
        rows, capacities = ([to[i] for to in entered] for i in (0, 1))
        assert rows[0] == 24, "the first bucket holds all rows, without any that nobody asked for"
        assert rows == sorted(rows, reverse=True)
        assert len(set(rows)) >= 4
        assert all(r == 24 or r & (r - 1) == 0 for r in rows)
        assert capacities == sorted(capacities)
        assert {3, 6, 12} <= set(capacities)
        assert ReplayedStep.made == (0 if way == "static" else len(entered)), "one graph a bucket"


def test_a_smaller_bucket_must_pay_back(llama, monkeypatch):
    entered = buckets_entered(monkeypatch)
    monkeypatch.setattr(loops, "FIRST_CAPACITY", 40)

    def rows(pays_back):
        entered.clear()
        monkeypatch.setattr(sampler, "StaticLoop", lambda draft, memory, run: StaticLoop(draft, memory, run, pays_back))
        draw(llama, decoding="static", group=8, max_new_tokens=40)
        return [to[0] for to in entered]

    assert rows(40) == [24], "with the first token drawn only 39 are left"
    assert len(rows(30)) > 1
    monkeypatch.setattr(loops, "FIRST_CAPACITY", 10)
    assert len(set(rows(1000))) > 1, "a larger buffer is prepared anyway"


def never_smaller(draft, memory, run):
    return StaticLoop(draft, memory, run, pays_back=1000)


def test_ended_rows_stop_the_loop_at_the_next_look(llama):
    tokens = []
    layer = llama.get_base_model().model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: tokens.append(1))
    rollout = draw(llama, decoding="static", eos=list(range(VOCABULARY)), max_new_tokens=30)
    assert len(tokens) == 1, "the prompts alone"
    assert rollout.completion_mask.shape[1] == 1
    tokens.clear()
    rollout = draw(llama, decoding="static", max_new_tokens=60)
    handle.remove()
    longest = rollout.completion_mask.shape[1]
    assert longest < 60
    assert longest <= len(tokens) <= longest + 2


def watched_loop(policy, **changes):
    """A static loop three steps into a rollout."""
    made, steps = [], []

    class Caught(StaticLoop):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def _step(self):
            steps.append(1)
            if len(steps) == 4:
                raise StopIteration
            super()._step()

    with patch.object(sampler, "StaticLoop", Caught), pytest.raises(StopIteration):
        draw(policy, decoding="static", eos=[], max_new_tokens=30, **changes)
    made[0]._memory.reserve(20)
    return made[0]


PROCESSED = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "min_new_tokens": 9}


@pytest.mark.parametrize("name", ["llama", "gpt2", *WINDOWED])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, PROCESSED], ids=["plain", "greedy", "processed"])
@torch.no_grad()
def test_a_step_never_waits_and_stays_where_it_is(name, changes):
    loop = watched_loop(tiny_policy(name), with_log_probs=True, **changes)

    def places():
        held = [*vars(loop).values(), *vars(loop._memory).values(), *vars(loop._draft).values()]
        held += [pair for store in (loop._memory._own, loop._memory._prompts) for pair in store.values()]
        return [(t.data_ptr(), t.shape) for t in tensors(held)]

    recorders = []
    before, drawn = places(), int(loop._memory.drawn)
    for _ in range(4):
        with NoDeviceWaits(), Recorder() as recorder:
            loop._step()
        recorders.append([(str(f), [t.shape for t in tensors([a, o])]) for f, a, _, o in recorder.calls])
    assert places() == before
    assert int(loop._memory.drawn) == drawn + 4
    assert recorders[0] == recorders[1] == recorders[2] == recorders[3], "operations and shapes depend on the step"
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no numbers at all: whatever asks for one fails
        copy.copy(loop)._step()


@pytest.mark.parametrize("name", ["llama", "gpt2", *WINDOWED])
@torch.no_grad()
def test_what_a_growing_memory_knows_of_its_rows_is_not_asked_for_at_each_token(name):
    memory = SharedMemory(policy_parts(tiny_policy(name)), 2)
    memory.prefill(*ragged_prompts())
    memory.keep(torch.tensor([0, 1, 4]))
    token = torch.tensor([3, 4, 5])
    memory.step(token)
    with NoDeviceWaits():
        memory.step(token)


# ------------------------------------------------------------------------------------------ logits that say nothing


@pytest.mark.parametrize("name", list(SPOILS))
@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"top_p": 0.9}, {"repetition_penalty": 1.2}])
def test_logits_that_say_nothing_are_found_at_the_next_look(llama, monkeypatch, changes, call, name):
    spoil(monkeypatch, call, SPOILS[name], slice(0, 1))
    with pytest.raises(NonFiniteLogitsError, match=f"logits for token {call + 1} of 1 of the 12 .*Likely causes"):
        draw(llama, decoding="static", eos=[], **changes)


@pytest.mark.parametrize("look", [1, 2, 5, 16])
def test_they_are_said_to_be_where_they_are_among_rows_that_end(llama, monkeypatch, look):
    """The same message as without buckets, also if rows end, and others break, before the next look."""
    messages, entered = [], buckets_entered(monkeypatch)
    monkeypatch.setattr(loops, "LOOK_EVERY", look)
    monkeypatch.setattr(loops, "FIRST_CAPACITY", 40)
    lengths = draw(llama).completion_mask.sum(1)
    assert (lengths < 4).any()
    last = int((lengths > 5).nonzero()[-1])
    for way in ("dynamic", "static"):
        with monkeypatch.context() as local:
            row = int((lengths[:last] > 4).sum()) if way == "dynamic" else last
            if way == "static":
                local.setattr(sampler, "StaticLoop", never_smaller)
            spoil(local, 4, SPOILS["all NaN"], slice(row, row + 1))
            with pytest.raises(NonFiniteLogitsError) as error:
                draw(llama, decoding=way)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert entered == [(12, 8)], "no row has left, or the one above is another"
    assert f"token 5 of 1 of the {int((lengths > 4).sum())} running" in messages[0]


def test_rows_that_have_ended_may_break(llama, monkeypatch):
    """What is drawn for them is never looked at."""
    lengths = draw(llama).completion_mask.sum(1)
    row = int((lengths < 4).nonzero()[0])
    plain, entered = draw(llama), buckets_entered(monkeypatch)
    monkeypatch.setattr(loops, "FIRST_CAPACITY", 40)
    monkeypatch.setattr(sampler, "StaticLoop", never_smaller)
    spoil(monkeypatch, 5, SPOILS["all NaN"], slice(row, row + 1))
    assert_same(draw(llama, decoding="static"), plain)
    assert entered == [(12, 8)]


def test_rows_may_break_behind_their_stop(llama, monkeypatch):
    """The stop is only seen at the look, behind which the row is not looked at."""
    monkeypatch.setattr(loops, "LOOK_EVERY", 16)
    monkeypatch.setattr(loops, "FIRST_CAPACITY", 40)
    plain, entered = draw(llama, eos=[], stop=two_alike), buckets_entered(monkeypatch)
    lengths = plain.completion_mask.sum(1)
    row = int(((lengths > 1) & (lengths < 5)).nonzero()[0])
    spoil(monkeypatch, 6, SPOILS["all NaN"], slice(row, row + 1))
    assert_same(draw(llama, eos=[], stop=two_alike, decoding="static"), plain)
    assert entered == [(12, 8)]


# --------------------------------------------------------------------------------------------------- which way is taken


def way(policy, decoding, device="cuda", share=True, **settings):
    config = SamplingConfig(decoding=decoding, **settings)
    return decoding_for(config, policy_parts(policy), torch.device(device), share)


def test_graphs_need_a_gpu(llama):
    with pytest.raises(ValueError, match="the policy is on the device 'cpu'. Set `sampling.decoding: auto`"):
        draw(llama, decoding="graphs")


def test_auto_on_a_cpu_is_dynamic_and_says_nothing(llama, monkeypatch):
    monkeypatch.setattr(sampler, "StaticLoop", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(llama, "auto", "cpu") == "dynamic"
        draw(llama)


def test_auto_takes_graphs_where_the_trial_succeeds(monkeypatch):
    monkeypatch.setattr(graphs, "CapturedStep", ReplayedStep)
    policy = tiny_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(policy, "auto") == way(policy, "graphs") == "graphs"
    assert way(policy, "auto", share=False) == way(policy, "dynamic") == "dynamic"
    assert way(policy, "static", "cpu", share=False) == "static"


def test_steps_that_wait_are_not_captured():
    policy = tiny_policy()
    norm = policy.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, out: out if out.isfinite().all() else out * 0)
    with pytest.warns(UserWarning, match=r"decoded without CUDA graphs \(its step waits for the device: aten\."):
        assert way(policy, "auto") == "dynamic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(policy, "auto") == "dynamic", "one line a model"
    with pytest.raises(ValueError, match=r"can't be done for LlamaForCausalLM: its step waits .*decoding: auto"):
        way(policy, "graphs")


def test_processors_are_part_of_the_trial(monkeypatch):
    from transformers.generation.logits_process import TopPLogitsWarper

    monkeypatch.setattr(graphs, "CapturedStep", ReplayedStep)
    policy = tiny_policy()
    assert way(policy, "auto", **PROCESSED) == "graphs"
    original = TopPLogitsWarper.__call__
    monkeypatch.setattr(TopPLogitsWarper, "__call__", lambda *args: original(*args) if args[2].max() else None)
    with pytest.warns(UserWarning, match="its step waits for the device"):
        assert way(policy, "auto", top_p=0.5) == "dynamic"
    assert way(policy, "auto") == "graphs", "without that processor it can be captured"


def test_a_capture_that_fails_or_replays_other_numbers_is_not_taken(monkeypatch):
    class Fails(ReplayedStep):
        def __call__(self):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    class Stale(ReplayedStep):
        def __call__(self):
            if self.recorder is None:
                super().__call__()

    for kind, reason in ((Fails, "capturing its step failed: operation not permitted"), (Stale, "drew other tokens")):
        monkeypatch.setattr(graphs, "CapturedStep", kind)
        policy = tiny_policy()
        with pytest.warns(UserWarning, match=reason) as caught:
            assert way(policy, "auto") == "dynamic"
        assert len(caught) == 1, [str(c.message) for c in caught]


def test_a_capture_that_fails_in_a_rollout_goes_on_without(llama, monkeypatch):
    """The trial runs two rows; other kernels may be taken for many."""
    tried = []

    def fails(self):
        tried.append(self)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs.CapturedStep, "_captured", fails)
    monkeypatch.setattr(sampler, "decoding_for", lambda *_: "graphs")
    ids, mask = ragged_prompts()
    config = SamplingConfig(max_new_tokens=30, temperature=1.3)

    def drawn():
        return sampler.sample(
            llama,
            ids,
            mask,
            group_size=4,
            config=config,
            eos_token_ids=EOS,
            pad_token_id=0,
            generator=torch.Generator().manual_seed(1),
        )

    with pytest.warns(UserWarning, match=r"its number of rows \(operation not permitted\): it is launched kernel by"):
        found = drawn()
    assert len(tried) == len(set(tried)) > 0, "each bucket tries once"
    monkeypatch.setattr(sampler, "decoding_for", lambda *_: "static")
    assert_same(found, drawn())
    monkeypatch.setattr(sampler, "decoding_for", lambda *_: "graphs")

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(graphs.CapturedStep, "_captured", full)
    with pytest.raises(ValueError, match="CUDA out of memory"):
        drawn()


def test_models_that_cannot_share_prompts_are_dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        policy = tiny_policy("falcon")
        assert way(policy, "auto") == "dynamic"
        for decoding in ("static", "graphs"):
            with pytest.raises(ValueError, match="can't be done for FalconForCausalLM: its attention"):
                way(policy, decoding)


def test_memory_is_that_of_the_formula(llama):
    loop = watched_loop(llama, group=2)
    parts = policy_parts(llama)
    assert isinstance(loop._memory, FixedMemory)
    held = sum(t.nbytes for store in (loop._memory._own, loop._memory._prompts) for t in tensors(list(store.values())))
    assert held / (3 * 7 + 6 * 20) == bytes_per_token(parts.model)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", *WINDOWED])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, PROCESSED], ids=["plain", "greedy", "processed"])
def test_graphs_draw_the_same_tokens(name, changes, monkeypatch):
    monkeypatch.setattr(sampler, "GRAPHS_PAY_BACK", 0)
    policy = tiny_policy(name).cuda()
    ids, mask = ragged_prompts()
    kwargs = {"prompts": (ids.cuda(), mask.cuda()), "group": 8, "max_new_tokens": 40, "with_log_probs": True, **changes}
    assert way(policy, "auto") == "graphs"
    plain = draw(policy, decoding="dynamic", **kwargs)
    assert_near(draw(policy, decoding="static", **kwargs), plain)
    assert_near(draw(policy, decoding="graphs", **kwargs), plain)


@pytest.mark.gpu
def test_graphs_of_a_four_bit_policy_draw_the_tokens_of_static_shapes(monkeypatch):
    monkeypatch.setattr(sampler, "GRAPHS_PAY_BACK", 0)
    policy = load_policy(PolicySettings(), torch.device("cuda"))  # the embedded one, NF4, with an adapter
    ids, mask = (x.cuda() for x in ragged_prompts())
    kwargs = {"prompts": (ids, mask), "group": 16, "max_new_tokens": 60, "with_log_probs": True}
    assert way(policy, "auto") == "graphs"
    assert_same(*(draw(policy, decoding=decoding, **kwargs) for decoding in ("static", "graphs")))
