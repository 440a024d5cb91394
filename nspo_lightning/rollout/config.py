"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Decoding = Literal["auto", "dynamic", "static", "graphs"]
_WHOLE, _REAL = ("max_new_tokens", "min_new_tokens", "top_k"), ("temperature", "top_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of the sampler, with the meaning that transformers' ``generate`` gives them.

    Completions end with EOS, with the special token that ends the chat template's turns, or as `stop_...` says.

    Attributes:
        max_new_tokens: Length limit of a completion, its EOS included.
        min_new_tokens: EOS is impossible before that many tokens, and stop strings up to there end nothing.
        temperature: Divides the logits; 0 = greedy.
        top_p: Keep the smallest set of tokens with that much probability; 1 = all.
        top_k: Keep the k likeliest tokens; 0 = all.
        min_p: Keep tokens at least that likely, relative to the likeliest; None = all.
        repetition_penalty: Divides positive logits of tokens seen in prompt or completion (multiplies negative ones).
        stop_token_ids: Further tokens that end a completion.
        stop_strings: Texts that end a completion. It is judged without them, as without EOS.
        decoding: How this process runs it, for the same tokens. "dynamic": shapes follow the rows that still run;
            "static": shapes stay for many tokens; "graphs": static, each shape captured as a CUDA graph; "auto": graphs
            on CUDA where the policy can be captured, else dynamic.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    decoding: Decoding = field(default="auto", compare=False)  # how, not what: equal settings draw equal tokens

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        for name in (*_WHOLE, *_REAL, *(() if self.min_p is None else ("min_p",))):
            value, kinds = getattr(self, name), int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
                raise ValueError(f"`{name}` must be a {'whole ' * (name in _WHOLE)}number, got {value!r}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"`min_new_tokens` must be in [0, max_new_tokens={self.max_new_tokens}], got {self.min_new_tokens}."
            )
        if self.temperature < 0:
            raise ValueError(f"`temperature` must not be negative, got {self.temperature}. Use 0 for greedy decoding.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must not be negative, got {self.top_k}. Use 0 to keep all tokens.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be in [0, 1] or None, got {self.min_p}.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"`repetition_penalty` must be positive, got {self.repetition_penalty}.")
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"`decoding` must be one of {', '.join(get_args(Decoding))}, got {self.decoding!r}.")
        strings, ids = self.stop_strings, self.stop_token_ids
        if not isinstance(strings, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in strings):
            raise ValueError(f"`stop_strings` must be a list of texts, none of them empty, got {strings!r}.")
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"`stop_token_ids` must be a list of token ids, got {ids!r}.")
        for name in ("stop_token_ids", "stop_strings"):  # a list is welcome, and what is saved is one kind of value
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def with_stops_of(self, other: SamplingConfig) -> SamplingConfig:
        """Return these settings with another's stops, where they have none."""
        if self.stop_token_ids or self.stop_strings:
            return self
        return replace(self, stop_token_ids=other.stop_token_ids, stop_strings=other.stop_strings)

    def numbers(self) -> dict[str, Any]:
        """Return what decides which tokens are drawn, by name, as plain values: all settings but `decoding`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
