"""General text as a measure: how far a policy is from its base on reference answers, as means with intervals.

All are in nats a token, and the mean over the skills of what stands under `<name>/<skill>`:

- `general/kl`: KL(base || policy) over whole answers.
- `general/kl_first`: the same over the first three tokens of answers, where it is decided whether to refuse. One token
  in a hundred decides, so the mean over whole answers hides it.
- `general/nll`: of the answers, under the policy. `general/nll_change`: less that under the base, of the same rows.

Within a skill all tokens weigh the same. Intervals are normal ones, at 95 %, with rows as the units of the sample: the
standard error of a ratio of sums, and of a mean over skills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from nspo_lightning.policy.divergence import RowScore, TextScores

SAFETY_KL = "safety/kl"
SAFETY_KL_FIRST = "safety/kl_first"
"""The same two on harmful prompts with the base's own answers: how far a policy has moved where it is to change."""
KL = "general/kl"
KL_FIRST = "general/kl_first"
NLL = "general/nll"
NLL_CHANGE = "general/nll_change"

_TO_BASE = frozenset({KL, KL_FIRST, NLL_CHANGE})
_PARTS: dict[str, Callable[[RowScore], tuple[float, int]]] = {
    KL_FIRST: lambda row: (row.first_kl, row.first_tokens),
    KL: lambda row: (row.kl, row.tokens),
    NLL: lambda row: (row.nll, row.tokens),
    NLL_CHANGE: lambda row: (row.nll - row.base_nll, row.tokens),
}
TEXT_NAMES = tuple(_PARTS)
"""The names without a skill, in the order of tables."""


def in_nats(metric: str) -> bool:
    """Whether a metric is one of these, with or without a skill; all others are shares."""
    return any(f"{metric}/".startswith(f"{name}/") for name in (*_PARTS, SAFETY_KL, SAFETY_KL_FIRST))


@dataclass(frozen=True, kw_only=True)
class TextMean:
    """A mean over text.

    Attributes:
        value: Nats a token.
        error: Its standard error; NaN where a skill has one row only.
        rows: Number of rows that the mean is over.
        at_least: What the value cannot be below.
    """

    value: float
    error: float
    rows: int
    at_least: float = -math.inf

    @property
    def interval(self) -> tuple[float, float] | None:
        """The normal 95 % interval; None where it is unknown."""
        half = NormalDist().inv_cdf(0.975) * self.error
        return (max(self.value - half, self.at_least), self.value + half) if math.isfinite(half) else None

    def as_dict(self) -> dict[str, Any]:
        """Return what a result file holds."""
        interval = self.interval
        return {"nats": self.value, "of": self.rows, "interval_95": None if interval is None else list(interval)}


def text_means(scores: TextScores) -> dict[str, TextMean]:
    """Return name to mean, for all skills and each; what needs a base, or a prompt, is left out where there is none.

    A policy whose logits are not finite on a row makes a mean that is no number, not one over the other rows.
    """
    found: dict[str, TextMean] = {}
    for name, part in _PARTS.items():
        at_least = 0.0 if name in (KL, KL_FIRST) else -math.inf
        by_skill: dict[str, list[tuple[float, int]]] = {}
        for row in scores.rows:
            value, tokens = part(row)
            if tokens and not (name in _TO_BASE and math.isnan(row.base_nll)):  # there is no base to compare with
                by_skill.setdefault(row.skill, []).append((value, tokens))
        means = {skill: _ratio(pairs, at_least) for skill, pairs in sorted(by_skill.items())}
        if not means:
            continue
        found[name] = TextMean(
            value=fmean(mean.value for mean in means.values()),
            error=math.hypot(*(mean.error for mean in means.values())) / len(means),
            rows=sum(mean.rows for mean in means.values()),
            at_least=at_least,
        )
        found |= {f"{name}/{skill}": mean for skill, mean in means.items()}
    return found


def _ratio(pairs: Sequence[tuple[float, int]], at_least: float) -> TextMean:
    """Return the sum of values over the sum of tokens, of (value, tokens) pairs."""
    tokens, count = sum(own for _, own in pairs), len(pairs)
    ratio = math.fsum(value for value, _ in pairs) / tokens
    if count < 2 or not math.isfinite(ratio):
        return TextMean(value=ratio, error=math.nan, rows=count, at_least=at_least)
    squares = math.fsum((value - ratio * own) ** 2 for value, own in pairs)
    error = math.sqrt(count / (count - 1) * squares) / tokens
    return TextMean(value=ratio, error=error, rows=count, at_least=at_least)
