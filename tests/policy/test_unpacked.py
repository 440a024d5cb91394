"""Weights held in full: the same function to the bit, forward and backward, and nothing of them in what is saved."""

from __future__ import annotations

import bitsandbytes
import lightning.pytorch as pl
import pytest
import torch
from tiny_jobs import adapter, datamodule, module, trainer
from tiny_policies import move_adapter_

from nspo_lightning import ranks
from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.compat import host
from nspo_lightning.policy import loading, unpacked
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.sampling_weights import SamplingWeights, choose_sampling_weights
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.unpacked import hold_unpacked, is_4bit, is_held, nbytes_of

CPU = torch.device("cpu")
IDS = torch.arange(10, 34).view(3, 8)


def settings_of(path, weights="auto", **kwargs):
    values = {"quantization": "nf4", "dtype": "float32", "lora": LoraSettings(r=4, alpha=8), **kwargs}
    return PolicySettings(path=str(path), training_weights=weights, **values)


def loaded(settings):
    torch.manual_seed(3)
    policy = load_policy(settings, CPU)
    move_adapter_(policy, 0.05)
    return policy


def results(policy, precision=None, training=True):
    """Logits, and the gradients of all that is trained."""
    policy.train(training)
    policy.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is not None):
        logits = policy(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **gradients}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def unpackings(monkeypatch):
    """Count how often bitsandbytes unpacks a matrix."""
    calls, op = [], torch.ops.bitsandbytes.dequantize_4bit.default

    def counted(*args):
        calls.append(args)
        return op(*args)

    monkeypatch.setattr(torch.ops.bitsandbytes.dequantize_4bit, "default", counted)
    return calls


@pytest.mark.parametrize(
    ("quantization", "dtype", "precision", "checkpointing"),
    [
        ("nf4", "float32", None, False),
        ("nf4", "float32", None, True),
        ("nf4", "bfloat16", None, False),
        ("fp4", "float32", "bf16", False),
    ],
)
def test_no_bit_changes_forward_or_backward(tiny_qwen2, unpackings, quantization, dtype, precision, checkpointing):
    """Qwen2 has biases; precision is autocast's."""
    settings = settings_of(tiny_qwen2, quantization=quantization, dtype=dtype, gradient_checkpointing=checkpointing)
    policy = loaded(settings)
    before = results(policy, precision)
    assert unpackings
    assert all(gradient.any() for gradient in before.values())
    hold_unpacked(policy, settings)
    unpackings.clear()
    assert same_bits(results(policy, precision), before)
    assert same_bits(results(policy, precision, training=False), before)
    assert not unpackings


def test_nothing_of_it_is_saved_or_named(tiny_llama):
    settings = settings_of(tiny_llama)
    policy = loaded(settings)
    state, names = policy.state_dict(), [name for name, _ in policy.named_modules()]
    fingerprint = policy_fingerprint(policy)
    hold_unpacked(policy, settings)
    assert all(map(is_held, filter(is_4bit, policy.modules())))
    assert same_bits(policy.state_dict(), state)
    assert [name for name, _ in policy.named_modules()] == names
    assert policy_fingerprint(policy) == fingerprint


@pytest.mark.parametrize("replace", [True, False])
def test_weights_that_change_are_unpacked_anew(tiny_llama, replace):
    settings = settings_of(tiny_llama)
    policy, other = loaded(settings), loaded(settings)
    hold_unpacked(policy, settings)
    for one in (policy, other):
        layer = one.get_base_model().model.layers[1].mlp.down_proj.base_layer
        if replace:
            values = torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(1))
            layer.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4").to("cpu")
        else:
            layer.weight.data.flatten()[:9].zero_()
            layer.weight.add_(0)  # as whoever changes a tensor in place leaves a mark
    assert same_bits(results(policy), results(other))


def test_sampling_takes_the_copy_that_is_there(tiny_llama, unpackings):
    settings = settings_of(tiny_llama)
    policy, plain = loaded(settings), loaded(settings)
    for mode in ("dequantized", "merged"):
        with SamplingWeights(plain, mode).in_place():
            expected = plain(input_ids=IDS).logits
        hold_unpacked(policy, settings)
        unpackings.clear()
        weights = SamplingWeights(policy, mode)
        with weights.in_place():
            assert torch.equal(policy(input_ids=IDS).logits, expected)
        assert not unpackings
        assert (weights.nbytes > 0) == (mode == "merged")
        assert all(map(is_held, filter(is_4bit, policy.modules()))), "back as it was"
    asked = settings_of(tiny_llama, sampling_weights="dequantized")
    weights, note = choose_sampling_weights(policy, asked)
    assert (weights.mode, note) == ("quantized", "")


@pytest.mark.parametrize(
    ("asked", "room", "held"), [("auto", 4.0, True), ("auto", 3.9, False), ("dequantized", 1.0, 1)]
)
def test_memory_decides_and_the_log_says_so(tiny_llama, monkeypatch, asked, room, held):
    settings = settings_of(tiny_llama, asked)
    policy = load_policy(settings, CPU)
    needed = sum(map(nbytes_of, filter(is_4bit, policy.modules())))
    monkeypatch.setattr(unpacked, "free_memory", lambda: int(needed * room) + 1)
    note = hold_unpacked(policy, settings)
    assert any(map(is_held, policy.modules())) == held
    assert f"`policy.training_weights: {asked}`" in note
    assert ("kept unpacked" if held else "unpacked for each product") in note
    assert "\n" not in note


@pytest.mark.parametrize("why", ["no room", "another rank"])
def test_no_room_for_what_was_asked_is_an_error(tiny_llama, monkeypatch, why):
    settings = settings_of(tiny_llama, "dequantized")
    policy = load_policy(settings, CPU)
    if why == "no room":
        monkeypatch.setattr(unpacked, "free_memory", lambda: 10)
    else:
        monkeypatch.setattr(ranks, "any_rank", lambda flag: True)
    with pytest.raises(PolicyError, match=r"training_weights: quantized`, which needs none"):
        hold_unpacked(policy, settings)
    assert not any(map(is_held, policy.modules()))


@pytest.mark.parametrize(("quantization", "asked", "note"), [("none", "auto", ""), ("nf4", "quantized", "")])
def test_where_there_is_nothing_to_do_nothing_is_said(tiny_llama, quantization, asked, note):
    settings = settings_of(tiny_llama, asked, quantization=quantization)
    policy = load_policy(settings, CPU)
    assert hold_unpacked(policy, settings) == note
    assert not any(map(is_held, policy.modules()))


def test_asked_for_without_a_4bit_layer_is_said(tiny_llama):
    settings = settings_of(tiny_llama, "dequantized", quantization="none")
    assert "no layer is in 4 bits" in hold_unpacked(load_policy(settings, CPU), settings)


def test_a_run_with_projection_is_the_same_to_the_bit(tiny_llama, tmp_path, recwarn):
    """Calibration, sampling, updates; and a run goes on from a checkpoint of the other kind without a warning."""

    def run(weights, name, steps, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        job = module(tiny_llama, policy=settings_of(tiny_llama, weights))
        text = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
        projection = NullSpaceProjection(text, criterion="rank", threshold=0.5, cache_dir=None)
        fit = trainer(tmp_path / name, steps, callbacks=[projection], max_epochs=-1)
        fit.fit(job, datamodule(), ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / name / "end.ckpt")
        held = sum(map(is_held, job.require_policy().modules()))
        return adapter(job), held

    one, none = run("quantized", "one", 2)
    two, held = run("auto", "two", 2)
    assert (none, held > 0) == (0, True)
    assert same_bits(one, two)
    run("auto", "again", 3, tmp_path / "one" / "end.ckpt")
    assert not [w for w in recwarn if "drew its completions" in str(w.message)]


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("found", "fast"),
    [({"avx512_f": False, "bf16": False}, False), ({"avx512_f": True}, True), ({"bf16": True}, True), ({}, True)],
)
def test_a_dtype_that_the_cpu_lacks_is_slow_and_said(tiny_llama, monkeypatch, recwarn, found, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert host.multiplies_fast(torch.bfloat16) == fast
    assert host.multiplies_fast(torch.float32)
    loading.load_policy(settings_of(tiny_llama, quantization="none", dtype="bfloat16"), CPU)
    said = [str(warning.message) for warning in recwarn if "no instructions for it" in str(warning.message)]
    assert len(said) == (not fast)
    assert all("policy.dtype: float32" in line for line in said)


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(host, "_LIMITS", ((limit, used),))
    whole = host.free_memory()
    assert whole > 0
    limit.write_text("5000\n")
    used.write_text("2000\n")
    assert host.free_memory() == 3000
    limit.write_text("max\n")
    assert host.free_memory() > 3000
