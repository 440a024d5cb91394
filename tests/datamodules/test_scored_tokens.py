"""Which tokens of general text are scored: those that the template gives to the answer, and the end of its turn."""

from __future__ import annotations

import logging

import pytest
from chat_templates import FAMILIES, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.text.collate import collate_text
from nspo_lightning.datamodules.text.render import ChatRenderer

ANSWERS = (
    "42",
    "x",
    "yes, and y",
    " 42 ",
    "\n\nThe answer is 42.\n",
    "The answer is 42.",
    "x = 7\n\nYes. It is 7.\n\n",
    "<|im_end|> is a marker",
    "Ünïcödé ✓",
)
WORDS = st.lists(st.sampled_from(["42", " ", "\n", ".", "x", "y", "The answer is", "[/INST]", "é", "</s>"]), min_size=1)


def row(answer, prompt="How much is 6 * 7?"):
    return PromptRow(prompt=prompt, answer=answer, skill="math", kind="benign", source="test", where="here")


def chats(family):
    yield "How much is 6 * 7?"
    question = [{"role": "user", "content": "A number?"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\n7"}]
    yield [*question, {"role": "user", "content": "x"}]
    if family.system:
        yield [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 * 7?"}]


def scored(tokenizer, rows, max_tokens=None):
    """The ids of each row that are scored."""
    batch = collate_text(rows, ChatRenderer(tokenizer), max_tokens)
    return [ids[keep.bool()].tolist() for ids, keep in zip(batch["input_ids"], batch["labels_mask"], strict=True)]


def assert_holds_just(tokenizer, ids, wanted):
    """The tokens hold the text, and one token less at either end would not."""
    text = tokenizer.decode(ids)
    assert wanted in text, f"{wanted!r} is not in what is scored: {text!r}"
    assert wanted not in tokenizer.decode(ids[1:])
    assert wanted not in tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_and_its_end_are_scored_whatever_the_template_adds(name):
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    for prompt in chats(family):
        rows = [row(answer, prompt) for answer in ANSWERS]
        for answer, ids in zip(ANSWERS, scored(tokenizer, rows), strict=True):
            if name == "qwen3":
                answer = answer.lstrip("\n")
            assert_holds_just(tokenizer, ids, (answer.strip() if family.trims else answer) + family.end)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(words=WORDS)
def test_any_answer_is_scored_whole(name, words):
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    answer = "".join(words)
    (ids,) = scored(tokenizer, [row(answer)])
    kept = answer.strip() if family.trims else answer.lstrip("\n") if name == "qwen3" else answer
    text = tokenizer.decode(ids)
    assert kept + family.end in text
    assert len(text) - len(kept + family.end) < 12  # no more than what one token holds of the template


def test_a_prompt_that_begins_a_thought_does_not_hide_the_answer():
    tokenizer = family_tokenizer("deepseek-r1")
    assert tokenizer.decode(scored(tokenizer, [row("42")])[0]) == "42<｜end▁of▁sentence｜>"
    assert tokenizer.decode(scored(tokenizer, [row("<think>\n6 * 7\n</think>42")])[0]) == "42<｜end▁of▁sentence｜>"


def test_a_thought_in_the_answer_is_the_answers_and_an_added_one_is_not():
    tokenizer = family_tokenizer("qwen3")
    assert_holds_just(tokenizer, scored(tokenizer, [row("42")])[0], "42<|im_end|>")
    thought = scored(tokenizer, [row("<think>\n6 * 7\n</think>\n\n42")])[0]
    assert_holds_just(tokenizer, thought, "6 * 7\n</think>\n\n42<|im_end|>")


def test_a_cut_text_keeps_the_beginning_of_its_answer():
    tokenizer = family_tokenizer("llama3")
    whole = scored(tokenizer, [row("The answer is 42."), row("")])
    batch = collate_text([row("The answer is 42.")], ChatRenderer(tokenizer))
    cut = scored(tokenizer, [row("The answer is 42.")], batch["input_ids"].shape[1] - 2)
    assert cut[0] == whole[0][:-2]
    assert tokenizer.decode(whole[1]).startswith("<|begin_of_text|>")  # all of a row without an answer


def test_a_long_text_is_encoded_without_a_word_of_the_library(tokenizer, caplog, monkeypatch):
    """It would say that running the text ends in indexing errors, of rows that are left out."""
    tokenizer.model_max_length = 8
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        assert len(ChatRenderer(tokenizer).encode(["a" * 50])[0]) == 50
    assert not caplog.records
