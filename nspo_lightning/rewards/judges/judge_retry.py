"""When a server fails: which failures are worth another try, and how long to wait before it.

The wait before try k (k = 1, 2, ...) is `min(backoff_max_s, backoff_s * 2^(k-1))`, scaled by a random factor in
[0.5, 1] so that clients don't come back in step; a Retry-After header replaces it, up to `retry_after_max_s`.

The openai client's own retries are switched off: they can't try again after a reply that can't be read, count no tries,
keep a slot while they wait, and take a long Retry-After for none instead of failing.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
"""Besides 5xx: timeout, conflict, too early, too many requests."""

HOPELESS_STATUS = frozenset({401, 403, 404})
"""Wrong key, no right, no such model or path: no request can succeed."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Bounded retries.

    Attributes:
        max_retries: Tries after the first.
        backoff_s: Wait before the first retry.
        backoff_max_s: Longest wait that backing off leads to.
        retry_after_max_s: Longest Retry-After that is obeyed; a server that asks for more counts as failing.
    """

    max_retries: int = 4
    backoff_s: float = 0.5
    backoff_max_s: float = 20.0
    retry_after_max_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_retries < 0 or min(self.backoff_s, self.backoff_max_s, self.retry_after_max_s) < 0:
            raise ValueError(f"Retries and waits must not be negative, got {self}.")

    def wait_s(self, retry: int, asked_s: float | None, rng: random.Random) -> float | None:
        """Say how long to wait before a retry (from 1), given what a Retry-After asks for; None if there is no more."""
        if retry > self.max_retries or (asked_s is not None and asked_s > self.retry_after_max_s):
            return None
        if asked_s is not None:
            return asked_s
        return min(self.backoff_max_s, self.backoff_s * 2.0 ** (retry - 1)) * rng.uniform(0.5, 1.0)

    def longest_s(self, timeout_s: float) -> float:
        """Bound the time until a question of tries of `timeout_s` has failed, if the server never says Retry-After."""
        waits = sum(min(self.backoff_max_s, self.backoff_s * 2.0**k) for k in range(self.max_retries))
        return (self.max_retries + 1) * timeout_s + waits


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read the seconds to wait from a Retry-After header, a number or a date (RFC 9110, 10.2.3); None if unreadable."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None
