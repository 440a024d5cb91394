"""Completions as text: without control tokens, but with the marks of a thought, also of one that the prompt opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nspo_lightning.evaluation.thoughts import THOUGHT_MARKS, completion_with_thought
from nspo_lightning.grpo import Rollout
from nspo_lightning.policy.turns import special_ids
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.stopping import text_before_stop, tokens_before_stop

_DEFAULT = SamplingConfig()
_PROMPT_END_TOKENS = 32  # a template opens a thought in its last few tokens


def completion_texts(
    tokenizer: Any,
    rollout: Rollout,
    sampling: SamplingConfig = _DEFAULT,
    prefixes: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Return the P * G completions of a rollout as text, without what ended them; see `completion_with_thought`.

    `prefixes` are tokens at the prompts' ends that begin the answers already, a list a prompt: they open no thought.
    """
    rows = rollout.prompt_ids.tolist()
    ends = [
        row[: len(row) - len(own)][-_PROMPT_END_TOKENS:]
        for row, own in zip(rows, prefixes or [()] * len(rows), strict=True)
    ]
    prompts: list[str] = tokenizer.batch_decode(ends, skip_special_tokens=False)
    texts = written_texts(tokenizer, rollout, sampling)
    return [completion_with_thought(text, prompts[i // rollout.group_size]) for i, text in enumerate(texts)]


def written_texts(tokenizer: Any, rollout: Rollout, sampling: SamplingConfig = _DEFAULT) -> list[str]:
    """Return the P * G completions as they were written: what a prompt opened stays with the prompt."""
    rows, stops = tokens_before_stop(rollout, sampling.stop_token_ids), sampling.stop_strings
    texts = _decoded(tokenizer, rows)
    if not stops:
        return texts
    passed = _decoded(tokenizer, [row[: sampling.min_new_tokens] for row in rows])  # stops in there ended nothing
    return [text_before_stop(text, stops, len(first)) for text, first in zip(texts, passed, strict=True)]


def _decoded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    marks = {*THOUGHT_MARKS, *THOUGHT_MARKS.values()}
    names = {number: str(tokenizer.convert_ids_to_tokens(number)) for number in special_ids(tokenizer)}
    special = {number: name for number, name in names.items() if name in marks}  # what decoding would drop
    if not special:
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
    return ["".join(_pieces(tokenizer, row, special)) for row in rows]


def _pieces(tokenizer: Any, row: Sequence[int], special: dict[int, str]) -> list[str]:
    pieces, start = [], 0
    for place in [i for i, token in enumerate(row) if token in special]:
        pieces += [tokenizer.decode(row[start:place], skip_special_tokens=True), special[row[place]]]
        start = place + 1
    return [*pieces, tokenizer.decode(row[start:], skip_special_tokens=True)]
