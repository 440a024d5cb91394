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

    `prefixes` are tokens at the prompts' ends that begin the answers already, a list a prompt: they are left out.
    """
    given = [list(own) for own in prefixes or [()] * rollout.num_prompts]
    prompts, begun = _prompt_ends(tokenizer, rollout, given), _decoded(tokenizer, given)
    texts, size = written_texts(tokenizer, rollout, sampling), rollout.group_size
    return [completion_with_thought(text, prompts[i // size], begun[i // size]) for i, text in enumerate(texts)]


def whole_texts(
    tokenizer: Any, rollout: Rollout, sampling: SamplingConfig, prefixes: Sequence[Sequence[int]]
) -> list[str]:
    """Return the P * G answers as `completion_texts` does, each with its beginning (see there).

    Both are decoded together: a token may need the one before it for its blank, or for half a character.
    """
    prompts, size = _prompt_ends(tokenizer, rollout, prefixes), rollout.group_size
    texts = _written(tokenizer, rollout, sampling, prefixes)
    return [completion_with_thought(text, prompts[i // size]) for i, text in enumerate(texts)]


def _prompt_ends(tokenizer: Any, rollout: Rollout, prefixes: Sequence[Sequence[int]]) -> list[str]:
    """Return the end of each rendered prompt, before the beginning of its answer."""
    rows = zip(rollout.prompt_ids.tolist(), prefixes, strict=True)
    ends = [row[: len(row) - len(own)][-_PROMPT_END_TOKENS:] for row, own in rows]
    found: list[str] = tokenizer.batch_decode(ends, skip_special_tokens=False)
    return found


def written_texts(tokenizer: Any, rollout: Rollout, sampling: SamplingConfig = _DEFAULT) -> list[str]:
    """Return the P * G completions as they were written: what a prompt opened stays with the prompt."""
    return _written(tokenizer, rollout, sampling, [()] * rollout.num_prompts)


def _written(
    tokenizer: Any, rollout: Rollout, sampling: SamplingConfig, prefixes: Sequence[Sequence[int]]
) -> list[str]:
    """Return the completions, each behind its prompt's own tokens of `prefixes`, in which nothing stops."""
    starts = [list(prefixes[i // rollout.group_size]) for i in range(len(rollout.completion_ids))]
    rows, stops = tokens_before_stop(rollout, sampling.stop_token_ids), sampling.stop_strings
    texts = _decoded(tokenizer, [start + row for start, row in zip(starts, rows, strict=True)])
    if not stops:
        return texts
    firsts = [start + row[: sampling.min_new_tokens] for start, row in zip(starts, rows, strict=True)]
    passed = _decoded(tokenizer, firsts)  # stops in there ended nothing
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
