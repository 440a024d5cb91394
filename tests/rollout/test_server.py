"""Rollouts from a server: the numbers are those of local scoring, and nothing stale or strange is ever trained on."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_server import BASE, LoraServer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.rollout import SamplingConfig, server_client
from nspo_lightning.rollout.server import RolloutServer
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.rollout.server_config import ServerSettings

SAMPLING = SamplingConfig(max_new_tokens=8)
SAME_NUMBERS = 1e-5  # two float32 implementations of one model


@pytest.fixture
def policy(tiny_llama):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    change(model)
    return model


def change(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.fixture
def server(tiny_llama):
    with LoraServer(tiny_llama) as running:
        yield running


def rollouts(server, folder, **settings):
    defaults: dict[str, Any] = {"retries": 3, "backoff_s": 0.01, "timeout_s": 20.0}
    return RolloutServer(
        ServerSettings(base_url=server.url, model=BASE, adapter_folder=str(folder / "shelf"), **(defaults | settings))
    )


def draw(source, name, tokenizer, sampling=SAMPLING, seed=5, group_size=3):
    encoded = tokenizer(
        ["How do I burn the mill?", "Say ferry."], padding=True, return_tensors="pt", padding_side="left"
    )
    rollout = source.sample(
        name,
        encoded["input_ids"],
        encoded["attention_mask"].bool(),
        group_size=group_size,
        config=sampling,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        seed=seed,
    )
    return rollout, rollout.log_probs


@pytest.fixture
def waits(monkeypatch):
    """What clients wait before they try again, in seconds."""
    seen = []

    def sleep(seconds):
        seen.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(server_client, "time", SimpleNamespace(sleep=sleep))
    return seen


@pytest.fixture
def tok(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_local_scoring(server, policy, tok, tmp_path, temperature):
    source = rollouts(server, tmp_path)
    sampling = SamplingConfig(max_new_tokens=8, temperature=temperature)
    source.check(sampling)
    rollout, log_probs = draw(source, source.publish(policy, 0), tok, sampling)
    local = score_completions(policy, rollout, temperature=temperature).log_probs
    assert (local - log_probs).abs().max() < SAME_NUMBERS
    with policy.disable_adapter():  # and the adapter was applied
        without = score_completions(policy, rollout, temperature=temperature).log_probs
    assert (without - log_probs).abs().max() > 100 * SAME_NUMBERS
    last = rollout.completion_ids.gather(1, rollout.completion_mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert torch.equal(rollout.finished, last == tok.eos_token_id)
    assert bool((rollout.finished | (rollout.completion_mask.sum(1) == 8)).all())


def test_the_same_seed_asks_for_the_same_and_noise_is_not_shared(server, policy, tok, tmp_path):
    source = rollouts(server, tmp_path)
    name = source.publish(policy, 0)
    first, again, other = (draw(source, name, tok, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert first.completion_ids.shape != other.completion_ids.shape or not torch.equal(
        first.completion_ids, other.completion_ids
    )
    used = [{request["seed"] + i for i in range(request["n"])} for request in server.requests]
    assert len(used[0] | used[1]) == 6
    assert not (used[0] | used[1]) & (used[4] | used[5])


def test_every_sampling_parameter_is_sent(server, policy, tok, tmp_path):
    source = rollouts(server, tmp_path)
    sampling = SamplingConfig(
        max_new_tokens=4, min_new_tokens=4, temperature=0.5, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.1
    )
    rollout, _ = draw(source, source.publish(policy, 0), tok, sampling)
    sent = server.requests[-1]
    expected = {"max_tokens": 4, "min_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05}
    assert expected.items() <= sent.items()
    assert sent["repetition_penalty"] == 1.1
    assert bool((rollout.completion_mask.sum(1) == 4).all())


def test_the_adapter_alone_travels_and_old_ones_go(server, policy, tok, tmp_path):
    source = rollouts(server, tmp_path)
    first = source.publish(policy, 0)
    assert source.publish(policy, 0) == first  # unchanged: nothing to send
    change(policy)
    second = source.publish(policy, 1)
    assert server.log == [("load", first), ("load", second), ("unload", first)]
    assert [folder.name for folder in (tmp_path / "shelf").iterdir()] == [second]
    files = {file.name for file in (tmp_path / "shelf" / second).iterdir()}
    assert files <= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    rollout, log_probs = draw(source, second, tok)
    assert (score_completions(policy, rollout).log_probs - log_probs).abs().max() < SAME_NUMBERS
    with pytest.raises(RolloutServerError, match="asked to load the adapter"):
        draw(source, first, tok)  # gone from server and shelf: no silent answer


def test_what_a_killed_run_left_is_unloaded(server, policy, tok, tmp_path):
    rollouts(server, tmp_path).publish(policy, 0)
    change(policy)
    name = rollouts(server, tmp_path).publish(policy, 1)
    assert list(server.adapters) == [name]


def test_a_restart_in_the_middle_reloads_the_adapter(server, policy, tok, tmp_path):
    source = rollouts(server, tmp_path)
    name = source.publish(policy, 0)
    before, _ = draw(source, name, tok)
    server.forget_next = True
    after, log_probs = draw(source, name, tok)
    assert server.log.count(("load", name)) >= 2
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert (score_completions(policy, after).log_probs - log_probs).abs().max() < SAME_NUMBERS


def test_a_server_that_is_away_for_a_while_is_waited_for(tiny_llama, policy, tok, tmp_path, waits):
    import threading

    with LoraServer(tiny_llama) as first:
        source = rollouts(first, tmp_path, retries=8, backoff_s=0.1)
        name = source.publish(policy, 0)
        port = first.port
    ready = LoraServer.__new__(LoraServer)

    def come_back():
        time.sleep(0.3)
        LoraServer.__init__(ready, tiny_llama, port)
        ready.__enter__()

    back = threading.Thread(target=come_back)
    back.start()
    rollout, log_probs = draw(source, name, tok)
    back.join()
    ready.__exit__()
    assert len(waits) >= 1  # a connection still open may yet have been served by the one that left
    assert (score_completions(policy, rollout).log_probs - log_probs).abs().max() < SAME_NUMBERS


def test_busy_servers_are_asked_again_and_timeouts_end(server, policy, tok, tmp_path, waits):
    source = rollouts(server, tmp_path)
    name = source.publish(policy, 0)
    server.fail_next = [503, 429]
    draw(source, name, tok)
    assert len(waits) == 2
    impatient = rollouts(server, tmp_path, timeout_s=0.05, retries=1)
    server.delay_s = 0.3
    with pytest.raises(RolloutServerError, match=r"no answer within `rollout_server.timeout_s` = 0.05 s \(2 tries\)"):
        draw(impatient, name, tok)


def edit(**changes):
    def apply(reply):
        reply["choices"][0] |= changes
        return reply

    return apply


def nan(reply):
    reply["choices"][0]["logprobs"]["token_logprobs"][0] = None
    return reply


def cut(reply):
    choice = reply["choices"][0]
    choice["token_ids"] = [5]
    choice["logprobs"]["token_logprobs"] = [-1.0]
    return reply


STRANGE = {
    "another prompt": (edit(prompt_token_ids=[1, 2, 3]), "completed another prompt"),
    "no ids": (edit(token_ids=None, logprobs=None), "0 token ids and 0 log-probabilities"),
    "no log-probability": (nan, "log-probability that is none"),
    "another vocabulary": (edit(token_ids=[10**6], logprobs={"token_logprobs": [-1.0]}), "vocabulary has"),
    "cut by its context": (cut, "--max-model-len"),
    "too few": (lambda reply: {**reply, "choices": reply["choices"][1:]}, "3 completions were asked for, and 2"),
    "no completion": (lambda reply: {"model": reply["model"]}, "answered no completion"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_replies_are_refused(server, policy, tok, tmp_path, kind):
    source = rollouts(server, tmp_path)
    name = source.publish(policy, 0)
    server.change_reply, message = STRANGE[kind]
    with pytest.raises(RolloutServerError, match=message):
        draw(source, name, tok)


def test_a_stale_adapter_under_its_own_name_is_refused(server, policy, tok, tmp_path):
    source = rollouts(server, tmp_path)
    name = source.publish(policy, 0)
    server.answers_as = BASE
    with pytest.raises(
        RolloutServerError, match=f"Stale adapter: completions were asked of '{name}'.*'{BASE}' answered"
    ):
        draw(source, name, tok)


def test_checks_at_the_start_say_what_is_wrong(server, tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(RolloutServerError, match=r"offers base, not 'llama-9b'.*rollout_server.model"):
        RolloutServer(ServerSettings(base_url=server.url, model="llama-9b", adapter_folder="x")).check(SAMPLING)
    server.loads_adapters = False
    with pytest.raises(RolloutServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        rollouts(server, tmp_path).check(SAMPLING)
    server.loads_adapters, server.processed = True, False
    rollouts(server, tmp_path).check(SAMPLING)  # at temperature 1 both kinds are the same
    with pytest.raises(RolloutServerError, match="processed_logprobs"):
        rollouts(server, tmp_path).check(SamplingConfig(max_new_tokens=8, temperature=0.7))
    server.key = "sk-right"
    monkeypatch.setenv("ROLLOUT_API_KEY", "sk-planted")
    with pytest.raises(RolloutServerError, match=r"refuses the key.*ROLLOUT_API_KEY") as refused:
        rollouts(server, tmp_path).check(SAMPLING)
    assert "planted" not in str(refused.value)
    monkeypatch.setenv("ROLLOUT_API_KEY", "sk-right")
    rollouts(server, tmp_path).check(SAMPLING)
    away = ServerSettings(base_url="http://127.0.0.1:9/v1", model=BASE, adapter_folder="x")
    with pytest.raises(RolloutServerError, match=r"No rollout server answers at http://127.0.0.1:9/v1"):
        RolloutServer(away).check(SAMPLING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "must be an address"),
        ({"base_url": "http://me:secret@host/v1"}, "carries a name or password"),
        ({"model": ""}, "`rollout_server.model` must not be empty"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"retries": -1}, "retries"),
        ({"importance_cap": 0.5}, "importance_cap"),
    ],
)
def test_settings_are_checked(changes, message):
    good: dict[str, Any] = {"base_url": "http://localhost:8000/v1", "model": "m", "adapter_folder": "a"}
    with pytest.raises(ValueError, match=message) as error:
        ServerSettings(**(good | changes))
    assert "secret" not in str(error.value)
