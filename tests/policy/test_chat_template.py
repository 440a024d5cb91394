"""One chat template with one set of variables, for whoever renders with the tokenizer, now or from its folder."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_jobs
import torch
from chat_templates import FAMILIES, family_tokenizer
from tiny_policies import move_adapter_
from transformers import AutoTokenizer

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.policy.chat_template import read_chat_template, with_chat_template
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path):
    """A Qwen3-like tokenizer as a policy's folder has it."""
    family_tokenizer("qwen3").save_pretrained(tmp_path / "qwen3")
    return str(tmp_path / "qwen3")


def loaded(folder, **settings):
    return load_tokenizer(PolicySettings(path=folder, **settings))


def prompt(tokenizer, **kwargs):
    return tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **kwargs)


def test_variables_hold_for_all_who_render_and_are_saved(folder, tmp_path):
    plain, quiet = loaded(folder), loaded(folder, chat_template_kwargs={"enable_thinking": False})
    assert prompt(plain).endswith("<|im_start|>assistant\n")
    assert prompt(quiet) == prompt(plain, enable_thinking=False) != prompt(plain)
    assert prompt(quiet).endswith("<think>\n\n</think>\n\n")
    quiet.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert prompt(again) == prompt(quiet)
    assert prompt(again, enable_thinking=True) == prompt(plain)  # whoever loads it may still ask for thoughts


@pytest.mark.parametrize(
    "value", [True, None, 3, -0.5, "a 'quoted' \"name\"\nof ✓ %} {{ x }}", ["a", {"b": [1, None]}], {"k": "v"}]
)
@pytest.mark.parametrize("begin", ["", "\n", "  {% if true %}x{% endif %}"])
def test_a_variable_means_what_it_means_as_an_argument(folder, value, begin):
    template = begin + "{% for m in messages %}{{ m.content }}{% endfor %}|{{ setting }}|{{ setting is none }}"
    given = loaded(folder, chat_template=template, chat_template_kwargs={"setting": value})
    assert prompt(given) == prompt(loaded(folder, chat_template=template), setting=value)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"enable_thinkng": False}, "'enable_thinkng'.*never reads.*change nothing"),
        ({"messages": []}, "'messages', which is no variable"),
        ({"add_generation_prompt": False}, "'add_generation_prompt', which is no variable"),
        ({"eos_token": "x"}, "'eos_token', which is no variable"),
        ({"enable thinking": False}, "'enable thinking', which is no variable"),
    ],
)
def test_a_variable_that_would_change_nothing_is_refused(folder, variables, says):
    with pytest.raises(PolicyError, match=says):
        loaded(folder, chat_template_kwargs=variables)


def test_of_several_templates_each_gets_the_variables(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": FAMILIES["qwen3"].template, "tool_use": FAMILIES["qwen3"].template}
    tokenizer.save_pretrained(folder)
    given = loaded(folder, chat_template_kwargs={"enable_thinking": False})
    for name in ("default", "tool_use"):
        assert prompt(given, chat_template=name).endswith("</think>\n\n")


def test_a_datamodules_template_is_the_policys(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "a.jinja").write_text(template)
    none, same = PolicySettings(), PolicySettings(chat_template=str(tmp_path / "a.jinja"))
    assert with_chat_template(none, None) == none
    assert with_chat_template(none, template).chat_template == template
    assert read_chat_template(str(with_chat_template(same, template).chat_template)) == template
    with pytest.raises(PolicyError, match=r"`policy\.chat_template` and `data\.chat_template`.*two templates"):
        with_chat_template(same, template + "!")


@pytest.mark.parametrize("place", ["datamodule", "policy"])
def test_training_calibration_and_scored_text_read_one_template(tiny_llama, tmp_path, monkeypatch, place):
    template = "{% for m in messages %}<|user|>{{ word }}{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    data = tiny_jobs.datamodule()
    policy: dict[str, Any] = {"chat_template_kwargs": {"word": "Now: "}}
    data.general.calibration_text = "prompt_and_model_answer"
    if place == "policy":
        policy["chat_template"] = template
    else:
        data.safety.chat_template = data.general.chat_template = template
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", **policy)
    module = tiny_jobs.module(tiny_llama, policy=settings)
    read: list[str] = []
    generate = module.text_policy.generate

    def noted(batch, *args, **kwargs):
        rows = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        read.extend(module.tokenizer.decode(ids[mask]) for ids, mask in rows)
        return generate(batch, *args, **kwargs)

    monkeypatch.setattr(module.text_policy, "generate", noted)
    run = tiny_jobs.trainer(tmp_path, steps=1, callbacks=[NullSpaceProjection(criterion="rank", threshold=0.5)])
    run.fit(module, data)
    assert any("Say" in text for text in read)  # calibration
    assert any("burn" in text for text in read)  # training
    read += [module.tokenizer.decode(ids) for batch in data.text_dataloader("test") for ids in batch["input_ids"]]
    assert all("<|user|>Now: " in text for text in read)
    module.save_adapter(tmp_path / "adapter")
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved.apply_chat_template(CHAT, tokenize=False) == "<|user|>Now: Hi<|end|><|assistant|>"


def test_calibration_answers_are_what_was_written_and_not_what_the_prompt_opened(tiny_llama):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    settings = PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", chat_template=template)
    job = tiny_jobs.module(tiny_llama, policy=settings)
    job.load(torch.device("cpu"))
    (answer,) = job.calibration_answers(["Say mill."])
    batch = job.text_policy.render(["Say mill."])
    rollout, (shown,) = job.text_policy.generate(batch, job.general_sampling, 1, 0)
    assert shown == f"<think>\n{answer}"
    (ids,) = rollout.completion_tokens()
    assert answer == job.tokenizer.decode(ids, skip_special_tokens=True)


def test_it_is_the_base_that_answers_calibration_prompts(tiny_llama):
    """So a warm start's adapter, and a run that goes on, are calibrated on the text that the first one was."""
    job = tiny_jobs.module(tiny_llama)
    job.load(torch.device("cpu"))
    prompts = [f"Say {word}." for word in tiny_jobs.WORDS]
    before = job.calibration_answers(prompts)
    move_adapter_(job.require_policy(), 0.5)
    assert job.calibration_answers(prompts) is before, "asked once"
    job.base_answers.known.clear()
    assert job.calibration_answers(prompts) == before
    batch = job.text_policy.render(prompts)
    _, moved = job.text_policy.generate(batch, job.general_sampling, 1, 0, exact=True)
    assert moved != before
