"""Weights to sample with: the same function unpacked, nearly the same merged, and nothing of it left behind."""

from __future__ import annotations

import contextlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny_jobs import Recorder, adapter, datamodule, module, trainer
from tiny_policies import largest_change, move_adapter_, tiny_policy

from nspo_lightning import ranks
from nspo_lightning.callbacks import ExactResume
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.grpo import ObjectiveConfig
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy import sampling_weights
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.sampling_weights import SamplingWeights, choose_sampling_weights
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.unpacked import unpacked
from nspo_lightning.rollout import SamplingConfig, sample

CPU = torch.device("cpu")
IDS = torch.arange(10, 34).view(3, 8)
GB = 10**9


def settings_of(path, **kwargs):
    # No copy that is held while training, which sampling would take.
    values = {"dtype": "float32", "lora": LoraSettings(r=4, alpha=8), "training_weights": "quantized", **kwargs}
    values["path"] = str(path)
    return PolicySettings(**values)


def loaded(path, **kwargs):
    """A policy whose adapter is not zero."""
    policy = load_policy(settings_of(path, **kwargs), CPU)
    move_adapter_(policy, 0.05)
    return policy


def logits_of(policy, ids=IDS):
    with torch.no_grad():
        return policy.eval()(input_ids=ids, use_cache=False).logits


def greedy(policy, weights=None):
    with (weights or SamplingWeights(policy, "quantized")).in_place():
        return sample(
            policy,
            IDS,
            torch.ones_like(IDS, dtype=torch.bool),
            group_size=2,
            config=SamplingConfig(max_new_tokens=12, temperature=0),
            eos_token_ids=[3],
            pad_token_id=0,
        ).completion_ids


def forwards(policy):
    return [module for module in policy.modules() if "forward" in vars(module)]


def products_of_4bit(policy):
    """Count calls of bitsandbytes' own layers."""
    calls = []

    def counting(layer):
        def forward(x):
            calls.append(layer)
            return type(layer).forward(layer, x)

        return forward

    for one in policy.modules():
        if type(one).__name__ == "Linear4bit" and type(one).__module__.startswith("bitsandbytes"):
            vars(one)["forward"] = counting(one)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_unpacked_weights_are_the_same_function(tiny_qwen2, dtype, precision):
    """Qwen2 has biases; precision is autocast's."""
    policy = loaded(tiny_qwen2, dtype=dtype)
    tokens, weights = greedy(policy), SamplingWeights(policy, "dequantized")
    calls = products_of_4bit(policy)
    with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
        before = logits_of(policy)
        assert calls
        calls.clear()
        with weights.in_place():
            inside = logits_of(policy)
        assert not calls, "nothing may be unpacked while sampling"
        assert torch.equal(logits_of(policy), before)
        assert calls
    assert inside.dtype == before.dtype
    assert largest_change(inside, before) <= 1e-5
    assert greedy(policy, weights).equal(tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
def test_merged_weights_are_the_policy_to_rounding(tiny_qwen2, quantization, dtype):
    policy = loaded(tiny_qwen2, quantization=quantization, dtype=dtype)
    expected, weights = logits_of(policy), SamplingWeights(policy, "merged")
    with adapters_off(policy):
        base = logits_of(policy)
    with weights.in_place():
        inside = logits_of(policy)
    rounding = 1e-5 if dtype == "float32" else 3e-2
    assert largest_change(inside, expected) <= rounding < largest_change(base, expected)
    assert torch.equal(logits_of(policy), expected)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_other_architectures_merge_as_well(name):
    """GPT-2 keeps its weights transposed."""
    policy = tiny_policy(name)
    expected, ids = logits_of(policy, IDS), IDS
    with SamplingWeights(policy, "merged").in_place():
        assert forwards(policy)
        assert largest_change(logits_of(policy, ids), expected) <= 1e-5


@pytest.mark.parametrize("mode", ["dequantized", "merged"])
@pytest.mark.parametrize("outside", [True, False])
def test_with_the_adapter_off_it_is_the_base(tiny_llama, mode, outside):
    policy = loaded(tiny_llama)
    weights = SamplingWeights(policy, mode)
    with adapters_off(policy):
        base = logits_of(policy)
    first, second = (
        (adapters_off(policy), weights.in_place()) if outside else (weights.in_place(), adapters_off(policy))
    )
    with first, second:
        inside = logits_of(policy)
    assert largest_change(inside, base) <= 1e-5
    assert largest_change(base, logits_of(policy)) > 1e-2


def test_a_merged_copy_never_drifts_and_leaves_the_policy_as_it_is(tiny_llama):
    """After many rollouts and updates it is base + s B A made from scratch; no bit of the policy moves meanwhile."""
    from bitsandbytes.functional import dequantize_4bit

    policy = loaded(tiny_llama, dtype="bfloat16")
    weights = SamplingWeights(policy, "merged")
    layer = policy.get_base_model().model.layers[1].mlp.down_proj
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    seen = []
    for _ in range(5):
        state = {name: value.clone() for name, value in policy.state_dict().items()}
        with weights.in_place():
            inside = layer(torch.eye(layer.in_features)).T
            greedy(policy)
        assert all(torch.equal(state[name], value) for name, value in policy.state_dict().items())
        assert not forwards(policy)
        base = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
        assert torch.equal(inside, (base.float() + update).bfloat16().float())
        seen.append(inside)
        policy.train()(input_ids=IDS).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(seen[0], seen[-1])


def test_autocast_does_not_round_the_update(tiny_llama):
    policy = loaded(tiny_llama)
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    weights, one = SamplingWeights(policy, "merged"), torch.eye(layer.in_features)
    with weights.in_place():
        expected = layer(one)
    with torch.autocast("cpu", dtype=torch.bfloat16), weights.in_place(), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(one), expected)


def test_nothing_is_left_behind_by_a_failure(tiny_llama):
    policy = loaded(tiny_llama)
    block = contextlib.ExitStack()
    block.enter_context(SamplingWeights(policy, "merged").in_place())
    assert forwards(policy)
    block.__exit__(RuntimeError, RuntimeError("in the middle"), None)
    assert not forwards(policy)


def test_a_forward_that_others_have_replaced_is_back_afterwards(tiny_llama):
    policy = loaded(tiny_llama)
    own = policy.get_base_model().model.layers[0].mlp.up_proj
    vars(own)["forward"] = mark = lambda x: own.__class__.forward(own, x)
    with SamplingWeights(policy, "merged").in_place():
        assert vars(own)["forward"] is not mark
    assert vars(own)["forward"] is mark


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bytes_are_those_of_the_copy(tiny_llama, lora, quantization):
    policy = loaded(tiny_llama, quantization=quantization, dtype="bfloat16", lora=LoraSettings(r=4, **lora))
    for mode in ("quantized", "dequantized", "merged"):
        weights = SamplingWeights(policy, mode)
        with weights.in_place():
            copies = [one.forward.__closure__ for one in forwards(policy)]
            tensors = {
                id(cell.cell_contents): cell.cell_contents
                for cells in copies
                for cell in cells
                if isinstance(cell.cell_contents, torch.Tensor) and cell.cell_contents.ndim == 2
            }
        assert weights.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert (weights.nbytes > 0) == (mode == "merged" or (mode == "dequantized" and quantization == "nf4"))


# ---------------------------------------------------------------- which is taken


@pytest.fixture
def card(monkeypatch):
    """A device with so much memory."""

    def set_memory(free, total, any_rank=lambda flag: flag):
        monkeypatch.setattr(sampling_weights, "memory_of", lambda device: (free, total))
        monkeypatch.setattr(ranks, "any_rank", any_rank)

    return set_memory


def test_auto_takes_what_there_is_room_for_and_says_so(tiny_llama, card):
    policy, settings = loaded(tiny_llama), settings_of(tiny_llama)
    needed = SamplingWeights(policy, "merged").nbytes
    for free, mode in ((needed + 2 * GB, "merged"), (needed + 2 * GB - 1, "quantized")):
        card(free, 8 * GB)
        weights, note = choose_sampling_weights(policy, settings)
        assert weights.mode == mode
        assert f"from {mode} weights" in note
        assert "2.0 GB are kept" in note
        assert "\n" not in note


def test_ranks_take_the_same(tiny_llama, card):
    card(80 * GB, 80 * GB, any_rank=lambda flag: True)  # another rank has no room
    policy = loaded(tiny_llama)
    assert choose_sampling_weights(policy, settings_of(tiny_llama))[0].mode == "quantized"
    with pytest.raises(PolicyError, match="sampling_weights: merged"):
        choose_sampling_weights(policy, settings_of(tiny_llama, sampling_weights="merged"))


@pytest.mark.parametrize("mode", ["dequantized", "merged"])
def test_no_room_for_what_was_asked_is_an_error_in_bytes(tiny_llama, card, mode):
    policy = loaded(tiny_llama)
    needed = SamplingWeights(policy, mode).nbytes
    card(needed - 1, GB)
    with pytest.raises(PolicyError) as error:
        choose_sampling_weights(policy, settings_of(tiny_llama, sampling_weights=mode))
    for part in (f"policy.sampling_weights: {mode}", f"{needed:,} bytes", "are free", "quantized"):
        assert part in str(error.value)
    card(needed, GB)
    assert choose_sampling_weights(policy, settings_of(tiny_llama, sampling_weights=mode))[0].mode == mode


def test_running_out_of_memory_while_copying_says_the_same(tiny_llama, monkeypatch):
    policy = loaded(tiny_llama)

    def full(layer):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(sampling_weights, "unpacked", full)
    with pytest.raises(PolicyError, match="sampling_weights: quantized"), SamplingWeights(policy, "merged").in_place():
        pass
    assert not forwards(policy)


def test_on_the_cpu_auto_changes_and_says_nothing(tiny_llama):
    weights, note = choose_sampling_weights(loaded(tiny_llama), settings_of(tiny_llama))
    assert (weights.mode, note) == ("quantized", "")


@pytest.mark.parametrize(
    ("changes", "why"), [({"lora": None}, "no adapter to merge"), ({"sampling_weights": "dequantized"}, "in 4 bits")]
)
def test_what_changes_nothing_is_said(tiny_llama, changes, why):
    settings = settings_of(tiny_llama, **{"quantization": "none", "sampling_weights": "merged", **changes})
    weights, note = choose_sampling_weights(load_policy(settings, CPU), settings)
    assert weights.mode == "quantized"
    assert why in note


# ---------------------------------------------------------------- in training


def run(path, folder, mode, steps=3, ckpt_path=None, dtype="float32", iterations=1, checkpoints=None, **kwargs):
    pl.seed_everything(0, verbose=False)
    settings = settings_of(path, sampling_weights=mode, dtype=dtype, **kwargs.pop("policy", {}))
    policy, recorder = module(path, policy=settings, num_iterations=iterations, **kwargs), Recorder()
    callbacks: list[Callback] = [recorder]
    if checkpoints is not None:
        callbacks += [ExactResume(), ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=1, save_top_k=-1)]
    job = trainer(
        folder, steps, Trainer, callbacks=callbacks, max_epochs=-1, enable_checkpointing=checkpoints is not None
    )
    job.fit(policy, datamodule(repeat_batches=iterations), ckpt_path=ckpt_path)
    return policy, recorder.steps


def test_training_from_unpacked_weights_is_training_as_ever(tiny_llama, tmp_path):
    (one, steps), (two, others) = (run(tiny_llama, tmp_path, mode) for mode in ("quantized", "dequantized"))
    assert [step["reward"] for step in steps] == [step["reward"] for step in others]
    assert not any(name.startswith("sampling/") for name in others[-1])
    for name, value in adapter(one).items():
        assert (value - adapter(two)[name]).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_from_merged_weights_logs_and_corrects_the_rounding(tiny_llama, tmp_path, dtype, checkpointing):
    changes = {"policy": {"gradient_checkpointing": checkpointing}, "objective": ObjectiveConfig(beta=0.01)}
    _, steps = run(tiny_llama, tmp_path, "merged", steps=6, dtype=dtype, iterations=2, **changes)
    differences = [step["sampling/sampling_logp_difference/mean"] for step in steps]
    limit = 1e-5 if dtype == "float32" else 0.05
    assert all(0 < difference <= limit for difference in differences[::2]), differences
    assert all(step["sampling/importance_sampling_ratio/max"] <= 2.0 for step in steps)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6), "the reference is the base, not a copy"


def test_the_ratio_is_to_the_log_probs_of_the_copy(tiny_llama, monkeypatch):
    """With a copy so coarse that rounding shows: what is kept is what the copy gives the tokens, not the policy."""
    monkeypatch.setattr(sampling_weights, "unpacked", lambda layer: unpacked(layer).bfloat16().float())
    job = module(tiny_llama, policy=settings_of(tiny_llama, sampling_weights="merged"))
    job.load(CPU)
    drawn = job.collector.rollouts.draw({"prompt_ids": IDS, "prompt_mask": torch.ones_like(IDS) > 0}, 1, 0)
    of_policy = job.scorer.log_probs(drawn.rollout)
    with SamplingWeights(job.require_policy(), "merged").in_place():
        of_copy = job.scorer.log_probs(drawn.rollout)
    assert (of_policy - of_copy).abs().max() > 1e-3
    assert (drawn.rollout.log_probs - of_copy).abs().max() < 1e-5


def test_a_resumed_run_goes_on_bitwise_and_says_where_the_weights_change(tiny_llama, tmp_path):
    """From the middle of a rollout too, whose log-probabilities under the copy are in the checkpoint."""
    whole, _ = run(tiny_llama, tmp_path, "merged", steps=4, iterations=2, checkpoints=tmp_path / "whole")
    for step in (1, 2):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        again, _ = run(tiny_llama, tmp_path, "merged", 4, path, iterations=2, checkpoints=tmp_path / "again")
        assert all(torch.equal(value, adapter(again)[name]) for name, value in adapter(whole).items())
    with pytest.warns(UserWarning, match="drew its completions from merged weights and goes on with quantized"):
        run(tiny_llama, tmp_path, "quantized", 4, path, iterations=2, checkpoints=tmp_path / "other")


def test_validation_and_the_base_answer_from_their_own_weights(tiny_llama):
    """With an update that bfloat16 loses: greedy answers are those of the weights as they are trained."""
    answers = {}
    for mode in ("quantized", "merged"):
        torch.manual_seed(3)
        job = module(tiny_llama, policy=settings_of(tiny_llama, sampling_weights=mode, dtype="bfloat16"))
        job.load(CPU)
        move_adapter_(job.require_policy(), 0.1)
        batch = {"prompt": ["a", "b", "c"], "prompt_ids": IDS, "prompt_mask": torch.ones_like(IDS) > 0}
        batch["columns"] = {"answer": ["x"] * 3}
        of_policy, of_base = job.evaluator.answer(batch, 1, 0), job.base_answer(batch, 1, 0)
        answers[mode] = (of_policy.completions, of_base.completions, job.calibration_answers(["a", "b"]))
    assert answers["quantized"] == answers["merged"]
    assert answers["merged"][0] != answers["merged"][1]


def test_only_what_is_learnt_from_is_drawn_from_merged_weights(tiny_llama, tmp_path, monkeypatch):
    modes, entered = [], SamplingWeights.in_place

    def noted(self):
        modes.append(self.mode)
        return entered(self)

    monkeypatch.setattr(SamplingWeights, "in_place", noted)
    job = module(tiny_llama, policy=settings_of(tiny_llama, sampling_weights="merged"))
    trainer(tmp_path, steps=2, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0).fit(job, datamodule())
    assert modes[:2] == ["merged"] * 2
    assert set(modes[2:]) == {"dequantized"}
    modes.clear()
    trainer(tmp_path, limit_test_batches=1).test(job, datamodule(), verbose=False)
    job.calibration_answers(["a"])
    assert modes
    assert set(modes) == {"dequantized"}
