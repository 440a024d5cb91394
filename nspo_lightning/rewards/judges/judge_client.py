"""Questions to an OpenAI-compatible server: bounded in number, in time and in tries, none asked twice.

Everything runs on one event loop (the judge's own), so plain attributes need no locks.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nspo_lightning.atomic import without_surrogates
from nspo_lightning.evaluation.thoughts import answer_of
from nspo_lightning.rewards.judges.judge_cache import JudgeCache, content_key
from nspo_lightning.rewards.judges.judge_retry import HOPELESS_STATUS, RETRYABLE_STATUS, RetryPolicy, retry_after_s
from nspo_lightning.rewards.messages import content_text
from nspo_lightning.terminal import counted

COUNTERS = ("requests", "answered", "cache_hits", "retries", "rate_limited", "timeouts", "unreadable", "errors")
"""`requests` counts tries, `errors` judgements that failed for good, the rest what happened on the way."""


_DOWN_AFTER = 4
"""Judgements in a row without any answer after which a server counts as down, however low the concurrency."""


_WINDOW = 2
"""Judgements that are begun for each slot: some wait to be tried again while others use the slots."""

_THINK_OFF = "`request_options: {chat_template_kwargs: {enable_thinking: false}}` with vLLM and SGLang"
_FILTERED = "nothing, since the server's content filter withheld the reply"


class JudgeDown(Exception):
    """A judgement failed for good: the server stayed down, refused, or kept answering what can't be read."""


class JudgeClient:
    """Asks a server, with everything that can go wrong on the way.

    Args:
        base_url: The server's `/v1` address.
        api_key_env: Environment variable with the key; servers of one's own need none.
        concurrency: Requests under way at once.
        timeout_s: Limit of one try.
        retry: Which tries follow.
        cache: Replies by content.
        is_readable: Says whether a reply can be read; one that can't counts as a failed try.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key_env: str,
        concurrency: int,
        timeout_s: float,
        retry: RetryPolicy,
        cache: JudgeCache,
        is_readable: Callable[[str], bool],
    ) -> None:
        self.base_url, self.api_key_env = base_url, api_key_env
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self.retry, self.cache, self.is_readable = retry, cache, is_readable
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._bound: _Bound | None = None
        self._rng = random.Random(0)
        self._failed_in_a_row = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    def start(self) -> None:
        """Give a server that was down another chance; called once a batch."""
        self._failed_in_a_row = 0

    async def ask(self, request: dict[str, Any], *, cached: bool = True) -> str:
        """Return a readable reply from the cache (if `cached`), of the same question under way or from the server.

        Raises:
            JudgeDown: If there is none.
        """
        bound, request = self._bound_here(), without_surrogates(request)
        key = content_key({"url": self.base_url, **request})
        if cached and (known := self.cache.get(key)) is not None and self.is_readable(known):
            self.counters["cache_hits"] += 1
            return known
        task = bound.under_way.get(key)
        if task is None:
            task = bound.under_way[key] = asyncio.ensure_future(self._answer(bound, key, request))
            task.add_done_callback(lambda _: bound.under_way.pop(key, None))
        else:
            self.counters["cache_hits"] += 1
        return await task

    def _bound_here(self) -> _Bound:
        loop = asyncio.get_running_loop()
        if self._bound is None or self._bound.loop is not loop:
            self._bound = _Bound(
                loop=loop,
                slots=asyncio.Semaphore(self.concurrency),
                window=asyncio.Semaphore(_WINDOW * max(self.concurrency, _DOWN_AFTER)),
                openai=_client(self.base_url, self._key() or "none", self.timeout_s),
            )
        return self._bound

    def _is_down(self) -> bool:
        return self._failed_in_a_row >= max(self.concurrency, _DOWN_AFTER)

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "")

    async def _answer(self, bound: _Bound, key: str, request: dict[str, Any]) -> str:
        async with bound.window:  # taken in order: a dead server is found out before everyone has tried once
            tries = 0
            while True:
                async with bound.slots:
                    if self._is_down():
                        self.counters["errors"] += 1
                        raise JudgeDown(
                            f"given up, since {counted(self._failed_in_a_row, 'judgement')} before it got no answer"
                        )
                    self.counters["requests"] += 1
                    reply = await self._try(bound.openai, request)
                tries += 1
                if isinstance(reply, str):
                    self._failed_in_a_row = 0
                    self.counters["answered"] += 1
                    self.cache.put(key, reply)
                    return reply
                wait_s = self.retry.wait_s(tries, reply.asked_s, self._rng) if reply.again else None
                if wait_s is None:
                    raise self._failed(reply, tries)
                self.counters["retries"] += 1
                await asyncio.sleep(wait_s)  # without a slot: others go on

    def _failed(self, failure: _Failure, tries: int) -> JudgeDown:
        if failure.hopeless:
            self._failed_in_a_row = max(self.concurrency, _DOWN_AFTER)  # everyone would be told the same
        elif failure.silent:
            self._failed_in_a_row += 1
        else:
            self._failed_in_a_row = 0  # the server is there, only this question has no answer
        self.counters["errors"] += 1
        return JudgeDown(f"{failure.problem} ({counted(tries, 'try', 'tries')})")

    async def _try(self, client: Any, request: dict[str, Any]) -> str | _Failure:
        import openai

        try:
            choice = await asyncio.wait_for(_send(client, request), self.timeout_s)
            reply = _text_of(choice)
        except (TimeoutError, asyncio.TimeoutError, openai.APITimeoutError):
            self.counters["timeouts"] += 1
            return _Failure(f"no reply within `request_timeout_s` = {self.timeout_s:g} s")
        except openai.APIStatusError as error:
            return self._refused(error.status_code, error.response.headers, str(error))
        except (ValueError, TypeError, AttributeError, LookupError):  # a body that is no (chat) completion
            self.counters["unreadable"] += 1
            return _Failure("a reply that is no completion", silent=False)
        except Exception as error:  # whatever else the network or the client library comes up with
            cause = error.__cause__ or error
            return _Failure(self._without_key(f"{type(error).__name__}: {str(cause)[:200] or type(cause).__name__}"))
        if reply is None or not self.is_readable(reply):
            self.counters["unreadable"] += 1
            return _why_unreadable(choice, request)
        return reply

    def _refused(self, status: int, headers: Mapping[str, str], message: str) -> _Failure:
        if status == 429:
            self.counters["rate_limited"] += 1
        if status in (401, 403):  # what the server says of a key may show the key
            return _Failure(f"status {status}: set the right key in ${self.api_key_env}", again=False, hopeless=True)
        again = status in RETRYABLE_STATUS or status >= 500
        problem = self._without_key(f"status {status}: {message[:200]}")
        hopeless = status in HOPELESS_STATUS
        return _Failure(problem, again=again, silent=again, hopeless=hopeless, asked_s=retry_after_s(headers))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """What belongs to one event loop: the client, its limits, and the questions under way by content."""

    loop: asyncio.AbstractEventLoop
    slots: asyncio.Semaphore
    window: asyncio.Semaphore
    openai: Any
    under_way: dict[str, asyncio.Task[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """Why a try failed.

    Attributes:
        problem: In words, without the key.
        again: Whether another try may succeed.
        silent: Whether the server gave no answer at all (nothing, an error page, "later").
        hopeless: Whether every other question would fail alike.
        asked_s: The wait that the server asked for.
    """

    problem: str
    again: bool = True
    silent: bool = True
    hopeless: bool = False
    asked_s: float | None = None


async def _send(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    kind, material = (client.chat.completions, "messages") if "messages" in request else (client.completions, "prompt")
    named = {name: request[name] for name in ("model", material)}
    others = {name: value for name, value in request.items() if name not in named}
    choice: dict[str, Any] = (await kind.create(**named, extra_body=others)).choices[0].model_dump(warnings=False)
    return choice


def _text_of(choice: Mapping[str, Any]) -> str | None:
    """Return what a choice of a reply says, without parts that are no text; None if it says nothing."""
    content = choice["message"]["content"] if choice.get("message") else choice.get("text")
    return content_text(content) if isinstance(content, (str, list)) else None


def _why_unreadable(choice: Mapping[str, Any], request: Mapping[str, Any]) -> _Failure:
    """Say why a choice holds no verdict, and which setting mends it."""
    message, text, ending = choice.get("message") or {}, _text_of(choice) or "", choice.get("finish_reason")
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    within = not answer_of(text) and bool(thought or text)
    if ending == "length":
        limit = request.get("max_completion_tokens", request.get("max_tokens"))
        where = ", within its thought" if within else f" ({text[:60]!r})"
        instead = f", or turn thinking off ({_THINK_OFF})" if within else ""
        return _Failure(
            f"a reply cut off at `max_tokens` = {limit}{where}: raise `max_tokens`{instead}", again=False, silent=False
        )
    if message.get("refusal") or ending == "content_filter":
        what = f"a refusal to judge ({str(message['refusal'])[:60]!r})" if message.get("refusal") else _FILTERED
        return _Failure(f"{what}: take another `model`, or a guard", again=False, silent=False)
    if within and thought:
        return _Failure(
            f"a thought ({str(thought)[:60]!r}) and no answer: turn thinking off ({_THINK_OFF}), or start the server "
            "with the `--reasoning-parser` of this model, or without one",
            silent=False,
        )
    if not text:
        return _Failure(f"a reply without text (finish_reason {ending!r})", silent=False)
    return _Failure(f"a verdict that can't be read: {text[:60]!r}", silent=False)


def _client(base_url: str, key: str, timeout_s: float) -> Any:
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ImportError(
            "A judge behind a server needs the openai client: pip install 'nspo-lightning[judges]'."
        ) from error
    return AsyncOpenAI(base_url=base_url, api_key=key, timeout=timeout_s, max_retries=0)
