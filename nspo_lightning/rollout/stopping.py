"""What ends a completion beside EOS: tokens and strings of the user's, and completions without them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor

from nspo_lightning.grpo.batch import Rollout


class EndsCompletions(Protocol):
    """Sees in completions so far, shape (r, n), which of them end here: shape (r,), bool."""

    def __call__(self, completions: Tensor, /) -> Tensor:
        """Look at them."""


@lru_cache(maxsize=4)  # making one reads the whole vocabulary
def stop_at(tokenizer: Any, strings: tuple[str, ...]) -> EndsCompletions | None:
    """Return what ends completions behind any of the strings, as transformers' `generate` does; None without any."""
    from transformers.generation import StopStringCriteria  # heavy: imported where it is used

    if not strings:
        return None
    criteria = StopStringCriteria(tokenizer, list(strings))

    def ends(completions: Tensor, /) -> Tensor:
        found: Tensor = criteria(completions, None)
        return found

    return ends


def tokens_before_stop(rollout: Rollout, stops: Collection[int]) -> list[list[int]]:
    """Return the completions' tokens, without the one of `stop_token_ids` that ended them."""
    rows = zip(rollout.completion_tokens(), rollout.finished.tolist(), strict=True)
    return [ids[:-1] if finished and ids[-1] in stops else ids for ids, finished in rows]


def text_before_stop(text: str, stops: Sequence[str], passed: int = 0) -> str:
    """Return a text up to the first of `stop_strings` in it that ends behind its first `passed` characters."""
    places = (text.find(stop, max(0, passed - len(stop) + 1)) for stop in stops)
    return text[: min((place for place in places if place >= 0), default=len(text))]
