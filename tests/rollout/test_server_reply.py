"""Replies of a completions server: whatever is wrong in one is refused in one message, and nothing of it is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest

from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.rollout.server_reply import completion_request, read_completions

STOP, VOCABULARY = [2], 50
REQUEST = completion_request("adapter", [5, 6, 7], 2, SamplingConfig(max_new_tokens=4), STOP, 0)
REPLY: dict[str, Any] = {
    "model": "adapter",
    "choices": [
        {
            "index": index,
            "prompt_token_ids": [5, 6, 7],
            "token_ids": [9, 11, 2],
            "logprobs": {"tokens": ["token_id:9", "token_id:11", "token_id:2"], "token_logprobs": [-1.0, -0.5, -2.0]},
            "finish_reason": "stop",
            "stop_reason": 2,
        }
        for index in range(2)
    ],
}
JUNK: list[Any] = [None, "x", "", math.nan, math.inf, -math.inf, 10**9, -1, 1.5, True, [], [None], {}, {"a": 1}]


def read(reply: Any) -> Any:
    return read_completions(reply, REQUEST, STOP, VOCABULARY)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> Any:
    reply: Any = {"": copy.deepcopy(REPLY)}
    *parents, last = ("", *path)
    inner = reply
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return reply[""]


def test_a_good_reply_is_read() -> None:
    assert [completion.ids for completion in read(REPLY)] == [[9, 11, 2]] * 2
    assert read(REPLY)[0].log_probs == [-1.0, -0.5, -2.0]


@pytest.mark.parametrize("path", list(places(REPLY)), ids=str)
def test_a_reply_with_junk_in_any_place_is_refused_or_still_good(path: tuple[Any, ...]) -> None:
    for junk in JUNK:
        try:
            completions = read(changed(path, junk))
        except RolloutServerError:
            continue
        assert len(completions) == 2
        for completion in completions:
            assert len(completion.ids) == len(completion.log_probs) > 0
            assert all(type(token) is int and 0 <= token < VOCABULARY for token in completion.ids)
            assert all(type(value) is float and -math.inf < value <= 0 for value in completion.log_probs)


@pytest.mark.parametrize("junk", [None, "x", math.nan, math.inf, -math.inf, 0.5, True, False, [-1.0]])
def test_a_log_probability_that_is_none_is_refused(junk: Any) -> None:
    for position in range(3):
        with pytest.raises(RolloutServerError, match="log-probability that is none"):
            read(changed(("choices", 1, "logprobs", "token_logprobs", position), junk))


@pytest.mark.parametrize("path", [("logprobs",), ("logprobs", "token_logprobs"), ("token_ids", 1)])
def test_what_is_missing_is_refused(path: tuple[Any, ...]) -> None:
    with pytest.raises(RolloutServerError):
        read(changed(("choices", 0, *path), None))
