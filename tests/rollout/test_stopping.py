"""A completion ends at EOS, at the token that ends the template's turns, at tokens and strings that the user names."""

from __future__ import annotations

import warnings

import pytest
import tiny_jobs
import torch
from chat_templates import FAMILIES, family_tokenizer
from tiny_policies import save_llama

from nspo_lightning.evaluation.thoughts import without_marks
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.settings import LoraSettings, PolicyError, PolicySettings
from nspo_lightning.policy.tokenizer import end_of_turn_id
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.rollout.server_reply import as_rollout, completion_request, read_completions
from nspo_lightning.rollout.stopping import stop_at
from nspo_lightning.rollout.texts import completion_texts, written_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose chat template ends turns with <|im_end|>, and whose EOS is <|endoftext|>."""
    torch.manual_seed(0)
    return save_llama(tmp_path_factory.mktemp("base"), family_tokenizer("chatml-on-a-base"))


def policy(folder):
    made = TextPolicy(PolicySettings(path=str(folder), quantization="none", dtype="float32", lora=LoraSettings(r=2)))
    made.load(torch.device("cpu"))
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_the_templates_turns_is_found(name):
    tokenizer = family_tokenizer(name)
    found = end_of_turn_id(tokenizer)
    end = FAMILIES[name].end.strip()
    assert found == (tokenizer.convert_tokens_to_ids(end) if end else None)


def test_a_template_that_fails_says_nothing():
    assert end_of_turn_id(family_tokenizer("plain", "{{ raise_exception('no answers') }}")) is None


def test_the_templates_end_ends_completions_and_that_is_said_once(base, caplog):
    made = policy(base)
    with caplog.at_level("INFO"):
        ends = [made.end_ids(SamplingConfig()) for _ in range(2)]
    tokens = [made.tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert ends == [sorted(tokens)] * 2
    assert [record.message for record in caplog.records if "<|im_end|>" in record.message] == [
        f"The chat template ends turns with '<|im_end|>' (token {tokens[1]}), which is no EOS of the policy: it ends "
        "completions too."
    ]
    rollout, _ = made.generate(made.render(["Hi"]), SamplingConfig(max_new_tokens=200), 64, 0)
    last = rollout.completion_ids.gather(1, rollout.completion_mask.sum(1, keepdim=True) - 1)
    assert set(last[rollout.finished].flatten().tolist()) == set(tokens)
    assert not torch.isin(rollout.completion_ids[:, :-1][~rollout.finished], torch.tensor(tokens)).any()


def test_named_tokens_and_strings_end_completions_and_are_not_judged(base):
    made = policy(base)
    (comma,) = made.tokenizer(",")["input_ids"]
    sampling = SamplingConfig(max_new_tokens=150, stop_token_ids=(comma,), stop_strings=("a", "er"))
    rollout, texts = made.generate(made.render(["Hi", "Ho"]), sampling, 32, 0)
    assert sampling.stop_token_ids == (comma,)
    whole = [without_marks(made.tokenizer.decode(ids)) for ids in rollout.completion_tokens()]
    ended_by = {stop: 0 for stop in (",", "a", "er", "<|endoftext|>", "<|im_end|>")}
    for text, judged, finished in zip(whole, texts, rollout.finished.tolist(), strict=True):
        assert not any(stop in judged for stop in (",", "a", "er"))
        stops = [stop for stop in ended_by if stop in text]
        assert bool(stops) == finished
        if finished:  # at the first stop that came
            assert text.startswith(without_marks(judged))  # a closing mark alone is text already
            ended_by[stops[0]] += 1
    assert ended_by[","] > 0
    assert ended_by["a"] > 0


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
@pytest.mark.parametrize("minimum", [0, 12])
def test_strings_end_nothing_before_the_minimum_and_what_is_judged_is_what_was_drawn(base, decoding, minimum):
    """vLLM's rule: it looks for stop strings behind `min_tokens` only, so both ways to draw agree."""
    made, stops = policy(base), ("a", "er")
    options = {"max_new_tokens": 60, "min_new_tokens": minimum, "decoding": decoding}
    free, _ = made.generate(made.render(["Hi", "Ho"]), SamplingConfig(**options), 32, 0)
    sampling = SamplingConfig(**options, stop_strings=stops)
    rollout, _ = made.generate(made.render(["Hi", "Ho"]), sampling, 32, 0)
    written, decode = written_texts(made.tokenizer, rollout, sampling), made.tokenizer.decode
    early = 0
    for ids, drawn, text in zip(free.completion_tokens(), rollout.completion_tokens(), written, strict=True):
        end = len(ids)
        for n in range(len(ids), minimum, -1):  # where a stop is completed by the n-th token
            before, now = decode(ids[: n - 1]), decode(ids[:n])
            if any(now.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in stops):
                end = n
        assert drawn == ids[:end]
        early += any(stop in decode(drawn[:minimum]) for stop in stops)
        whole, kept = decode(drawn, skip_special_tokens=True), decode(drawn[:-1], skip_special_tokens=True)
        assert whole.startswith(text)
        assert text == whole or whole[len(text) :].startswith(stops), "nothing but a stop is cut off"
        assert len(text) > len(kept) - max(map(len, stops)), "and only at the last token"
    assert bool(early) == bool(minimum)


def test_a_string_may_end_inside_a_token_and_across_tokens():
    tokenizer = family_tokenizer("plain")
    ids = tokenizer("So it is.\n\nuser: more")["input_ids"]
    stop = stop_at(tokenizer, ("\nuser:",))
    assert stop is not None
    ends = [bool(stop(torch.tensor([ids[: n + 1]]))) for n in range(len(ids))]
    length = ends.index(True) + 1
    assert "\nuser:" in tokenizer.decode(ids[:length])
    assert "\nuser:" not in tokenizer.decode(ids[: length - 1])
    rollout = Rollout(
        prompt_ids=torch.zeros(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        group_size=1,
        completion_ids=torch.tensor([ids[:length]]),
        completion_mask=torch.ones(1, length, dtype=torch.bool),
        finished=torch.tensor([True]),
    )
    assert completion_texts(tokenizer, rollout, SamplingConfig(stop_strings=("\nuser:",))) == ["So it is.\n"]
    assert stop_at(tokenizer, ()) is None


def test_evaluation_stops_as_training_does(base):
    sampling = SamplingConfig(max_new_tokens=6, stop_strings=("###",))
    own = SamplingConfig(max_new_tokens=3, stop_token_ids=(7,))
    made = tiny_jobs.module(base, sampling=sampling)
    assert made.evaluation_sampling.stop_strings == made.general_sampling.stop_strings == ("###",)
    made = tiny_jobs.module(base, sampling=sampling, evaluation_sampling=SamplingConfig(max_new_tokens=3))
    assert made.evaluation_sampling == SamplingConfig(max_new_tokens=3, stop_strings=("###",))
    assert tiny_jobs.module(base, sampling=sampling, evaluation_sampling=own).evaluation_sampling == own


def test_a_first_rollout_without_an_end_is_warned_of(tiny_llama, tmp_path):
    data, sampling = tiny_jobs.datamodule(), SamplingConfig(max_new_tokens=2)
    with pytest.warns(
        UserWarning, match=r"(?s)ran to `sampling.max_new_tokens` \(2\).*<\|end\|>.*stop_strings"
    ) as seen:
        tiny_jobs.trainer(tmp_path, steps=3).fit(tiny_jobs.module(tiny_llama, sampling=sampling), data)
    assert len([w for w in seen if "first rollout" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*first rollout.*")
        every = tuple(range(300))
        sampling = SamplingConfig(max_new_tokens=2, stop_token_ids=every)
        tiny_jobs.trainer(tmp_path, steps=1).fit(tiny_jobs.module(tiny_llama, sampling=sampling), data)


def test_values_that_could_end_nothing_are_refused(base):
    with pytest.raises(ValueError, match="stop_strings"):
        SamplingConfig(stop_strings=("",))
    with pytest.raises(ValueError, match="stop_strings"):
        SamplingConfig(stop_strings="###")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop_token_ids"):
        SamplingConfig(stop_token_ids=(-1,))
    with pytest.raises(PolicyError, match=r"`sampling.stop_token_ids` has 99999.*never be drawn"):
        policy(base).end_ids(SamplingConfig(stop_token_ids=(99_999,)))


def test_a_server_is_asked_to_stop_there_too():
    config = SamplingConfig(max_new_tokens=8, stop_strings=("###",))
    request = completion_request("m", [1, 2], 1, config, [5], 0)
    assert request["stop"] == ["###"]
    choice = {"token_ids": [3, 4], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "stop"}
    reply = {"model": "m", "choices": [{**choice, "stop_reason": "###"}]}
    rows = read_completions(reply, request, [5], 10)
    rollout = as_rollout(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), [rows], [5], 0)
    assert rollout.finished.tolist() == [True]
    with pytest.raises(RolloutServerError, match="ended after 2 of 8 tokens"):
        read_completions({"model": "m", "choices": [{**choice, "stop_reason": "other"}]}, request, [5], 10)
