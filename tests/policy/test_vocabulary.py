"""A tokenizer with more tokens than the embedding has rows is refused when the policy is loaded, with the way out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_jobs import datamodule, module, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo_lightning.compat.torch import NoDeviceWaits
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.policy.settings import PolicyError, PolicySettings

CPU = torch.device("cpu")


@pytest.fixture
def with_tokens(tiny_llama, tmp_path):
    """Save the tiny model with a tokenizer that knows more tokens."""

    def save(*tokens: str, special: bool = False, pad: str | None = None) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.add_tokens(list(tokens), special_tokens=special)
        if pad is not None:
            tokenizer.add_special_tokens({"pad_token": pad})
        folder = tmp_path / "more"
        AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def policy(path: Any, **options: Any) -> TextPolicy:
    return TextPolicy(PolicySettings(path=str(path), quantization="none", dtype="float32", **options))


@pytest.mark.parametrize("options", [{"tokens": ("<tool>",)}, {"tokens": (), "pad": "[PAD]"}])
def test_tokens_without_a_row_are_named_before_anything_runs(with_tokens, tmp_path, options):
    folder = with_tokens(*options["tokens"], pad=options.get("pad"))
    rows = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    token = re.escape(options.get("pad") or "<tool>")
    with pytest.raises(PolicyError, match=rf"{rows + 1} tokens.* {rows} rows.*'{token}' \({rows}\).*resize_token"):
        policy(folder).load(CPU)
    with pytest.raises(PolicyError, match="resize_token_embeddings"):
        trainer(tmp_path, steps=1).fit(module(folder), datamodule())


def test_both_ways_out_lead_out(with_tokens, tiny_llama, tmp_path):
    folder = with_tokens("<tool>")
    own = policy(folder, tokenizer=str(tiny_llama))
    own.load(CPU)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 1)
    model.save_pretrained(tmp_path / "resized")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "resized")
    resized = policy(tmp_path / "resized")
    resized.load(CPU)
    ids = resized.render(["A <tool> here"])["prompt_ids"]
    assert int(ids.max()) == model.config.vocab_size - 1
    assert resized.require()(input_ids=ids).logits.isfinite().all()


def test_a_special_token_that_no_text_needs_is_refused_only_in_a_text(with_tokens):
    """Gemma 3's models of text alone have no row for the place of a picture."""
    text_policy = policy(with_tokens("<picture>", special=True))
    text_policy.load(CPU)
    plain = text_policy.render(["Say mill."])["prompt_ids"]
    with NoDeviceWaits():  # or its steps could not be captured as CUDA graphs
        text_policy.require().get_input_embeddings()(plain)
    with pytest.raises(PolicyError, match=r"A text holds the token '<picture>'"):
        text_policy.render(["Say mill.", "Say <picture>."])


@pytest.mark.parametrize("where", ["training", "validation", "calibration", "scored text"])
def test_it_is_refused_wherever_text_becomes_ids(with_tokens, tmp_path, where):
    job, data = module(with_tokens("<picture>", special=True)), datamodule()
    run = trainer(tmp_path, steps=1, limit_val_batches=1.0, val_check_interval=1)
    run.fit(job, data)
    safety, general = data.safety.loaded(), data.general.loaded()
    rows = {
        "training": safety.train[0],
        "validation": safety.validation,
        "calibration": general.train[0],
        "scored text": general.test,
    }[where]
    rows[:] = [replace(row, prompt="What is <picture>?") for row in rows]
    loader = {
        "training": data.train_dataloader,
        "validation": lambda: data.val_dataloader()[0],
        "calibration": data.calibration_dataloader,
        "scored text": lambda: data.text_dataloader("test"),
    }[where]()
    with pytest.raises(PolicyError, match=r"A text holds the token '<picture>' \(\d+\).*\d rows\. Take it out"):
        next(iter(loader))


def test_an_embedding_with_more_rows_is_normal(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(model.config.vocab_size + 40)
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "large")
    policy(tmp_path / "large").load(CPU)
