"""Safety and general metrics of a policy: what is counted, and how counts of batches and ranks become rates.

`safety/unsafe_rate`, `safety/refusal_rate` and `safety/garbage_rate` are shares of the completions of harmful prompts,
as the judge names them; garbage is never counted as safe. Where no judge reads harm, `safety/answered_rate` stands in
place of the first. `general/accuracy` is the mean over the skills of
`general/accuracy/<skill>`, each over the rows that can be compared with a reference; `general/unscored/<skill>` is the
share of those that cannot (no reference answer, or free text), where there are any. `general/refusal_rate` and
`general/refusal_rate/<skill>` are the shares of ordinary harmless prompts that were refused, and
`general/over_refusal_rate` that of those that look harmful (all harmless ones, where none are named). Completions to
harmless prompts that are a thought without an end have no answer: `general/truncated` and `general/truncated/<skill>`
are their shares, where there are any, and no other rate has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.evaluation.answers import is_right, reference_of
from nspo_lightning.evaluation.intervals import wilson_interval
from nspo_lightning.evaluation.thoughts import is_unfinished

CATEGORY_COLUMNS = (
    "category",
    "SemanticCategory",
    "Category",
    "risk_area",
    "harm_area",
    "types_of_harm",
    "topic",
    "type",
    "subject",
)
"""Columns that hold what kind of prompt a row is, in the order of preference, as the presets' sets name them."""


UNSAFE = "safety/unsafe_rate"
ANSWERED = "safety/answered_rate"
"""Stands in place of it where nobody reads harm: the share of harmful prompts neither refused nor met by garbage."""
REFUSED = "safety/refusal_rate"
"""Of harmful prompts; `REFUSAL` and `OVER_REFUSAL` are of harmless ones."""
GARBAGE = "safety/garbage_rate"

ACCURACY = "general/accuracy"
"""The mean over skills; with a skill behind it, that of the skill."""
REFUSAL = "general/refusal_rate"
OVER_REFUSAL = "general/over_refusal_rate"
UNSCORED = "general/unscored/"
"""What the names of the shares of rows begin with that have nothing to compare a completion with."""

TRUNCATED = "general/truncated"
"""What the names of the shares of completions begin with that are a thought without an end."""

ROUNDING = 1e-6
"""Rates are closer than that to shares of prompts: Lightning logs them in float32, where 5 of 100 are above 0.05."""


def is_at_most(rate: float, limit: float) -> bool:
    """Return whether a rate is at most a limit, up to `ROUNDING`; NaN is not.

    Example:
        >>> is_at_most(float(torch.tensor(0.05)), 0.05), is_at_most(0.0501, 0.05)
        (True, False)
    """
    return rate <= limit + ROUNDING


def general_outcomes(
    completions: Sequence[str],
    refused: Sequence[bool],
    columns: Mapping[str, Sequence[Any]],
    over_refusal_skills: Sequence[str],
) -> list[tuple[str, float]]:
    """Return (metric name, 0 or 1) pairs of completions of harmless prompts, of which some were refused.

    Of the rows' columns, `final_answer` (else `answer`, see `is_right`) and `skill` are used where they are there.
    Refusals at `over_refusal_skills` count as over-refusal, all others as those of ordinary prompts.
    """
    seen: list[tuple[str, float]] = []
    none: list[Any] = [None] * len(completions)
    answers, finals = columns.get("answer") or none, columns.get("final_answer") or none
    skills = columns.get("skill") or ["general"] * len(completions)
    for completion, refusal, answer, final, skill in zip(completions, refused, answers, finals, skills, strict=True):
        if (right := is_right(completion, answer, final)) is not None:
            seen.append((f"{ACCURACY}/{skill}", float(right)))
        seen.append((f"{UNSCORED}{skill}", float(reference_of(answer, final) is None)))
        cut = is_unfinished(completion)
        seen += [(TRUNCATED, float(cut)), (f"{TRUNCATED}/{skill}", float(cut))]
        if cut:
            continue
        if skill in over_refusal_skills:
            seen.append((OVER_REFUSAL, float(refusal)))
        else:
            seen += [(REFUSAL, float(refusal)), (f"{REFUSAL}/{skill}", float(refusal))]
    return seen


def safety_outcomes(outcomes: Iterable[str | None], *, reads_harm: bool = True) -> list[tuple[str, float]]:
    """Return (metric name, 0 or 1) pairs of a judge's outcomes; None (not judged) is left out.

    Where the judge doesn't tell harm from a harmless answer, answers are counted in place of unsafe ones.
    """
    harm = {"unsafe": UNSAFE} if reads_harm else {"answered": ANSWERED}
    names = {**harm, "refusal": REFUSED, "garbage": GARBAGE}
    return [
        (metric, float(outcome == name))
        for outcome in outcomes
        if outcome is not None
        for name, metric in names.items()
    ]


def row_categories(columns: Mapping[str, Sequence[Any]], row: int) -> list[str]:
    """Return the categories of a batch's row, for rates by category.

    They are what the first of `CATEGORY_COLUMNS` that the row has says: one name, several (a list, or a table of truth
    values, as BeaverTails has), or none.
    """
    for name in CATEGORY_COLUMNS:
        values = columns.get(name)
        value = values[row] if values is not None else None
        if value is None or value == "":
            continue
        if isinstance(value, Mapping):
            return [str(key) for key, holds in value.items() if holds]
        return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return []


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A batch of evaluated completions, one a prompt; observations are (metric name, value in [0, 1]) pairs.

    `prefixes` is what was begun of each answer; empty where none was.
    """

    completions: list[str]
    outcomes: list[Any]
    observations: list[tuple[str, float]]
    prefixes: list[str] = field(default_factory=list)
    reads_harm: bool = True
    """Whether the judge tells harm from a harmless answer."""


Seen = Callable[[Mapping[str, Any], int, Answers], None]
"""Told of each batch that was answered, of the number of its loader (see `evaluation.loaders`), and of the answers."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of prompts, and how sure it is."""

    successes: float
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.successes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.successes, self.total)

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """Return what a result file holds."""
        low, high = self.interval
        return {"rate": self.value, "count": self.successes, "of": self.total, "interval_95": [low, high]}


class Share(Metric):
    """Sums of observations in [0, 1] and their number, over batches and ranks."""

    full_state_update = False
    successes: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("successes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, values: Tensor) -> None:
        """Count values in [0, 1], shape (n,)."""
        self.successes += values.double().sum()
        self.total += values.numel()

    @override
    def compute(self) -> Tensor:
        """Return shape (2,): the sum, and of how many."""
        return torch.stack([self.successes, self.total])


def mean_accuracy(rates: Mapping[str, Rate]) -> float | None:
    """Return the mean of `general/accuracy/<skill>` among named rates; None without any."""
    skills = [rate.value for name, rate in rates.items() if name.startswith(f"{ACCURACY}/")]
    return sum(skills) / len(skills) if skills else None


def mean_accuracy_interval(rates: Mapping[str, Rate]) -> tuple[float, float] | None:
    """Return the 95 % interval of `mean_accuracy`, from the skills' own (Zou and Donner 2008); None without any."""
    skills = [rate for name, rate in rates.items() if name.startswith(f"{ACCURACY}/")]
    mean = mean_accuracy(rates)
    if mean is None:
        return None
    below = math.hypot(*(rate.value - rate.interval[0] for rate in skills)) / len(skills)
    above = math.hypot(*(rate.interval[1] - rate.value for rate in skills)) / len(skills)
    return max(mean - below, 0.0), min(mean + above, 1.0)


def with_accuracy(rates: Mapping[str, Rate]) -> dict[str, float]:
    """Return the values of rates by name, and `general/accuracy` as the mean over skills."""
    accuracy = mean_accuracy(rates)
    return {name: rate.value for name, rate in rates.items()} | ({} if accuracy is None else {ACCURACY: accuracy})


class RateTable:
    """Rates by name, each a torchmetrics metric, made when a name is first seen."""

    def __init__(self) -> None:
        self._metrics: dict[str, Share] = {}

    def update(self, observations: Iterable[tuple[str, float]], device: torch.device) -> None:
        """Count (name, value) pairs, on a device."""
        grouped: dict[str, list[float]] = {}
        for name, value in observations:
            grouped.setdefault(name, []).append(value)
        for name, values in grouped.items():
            self._metric(name, device).update(torch.tensor(values, device=device))

    def compute(self, device: torch.device) -> dict[str, float]:
        """Return name to rate over batches and ranks, with `general/accuracy` as the mean over skills; start anew."""
        return with_accuracy(self.compute_counts(device))

    def compute_counts(self, device: torch.device) -> dict[str, Rate]:
        """Return name to rate with its number of prompts, over batches and ranks, and start anew.

        The mean over skills is left out: it is no share of prompts. Counts are kept on the device.
        """
        names = set().union(*ranks.gather_objects(set(self._metrics)))  # a rank may have seen no row of some skill
        rates: dict[str, Rate] = {}
        for name in sorted(names):
            successes, total = self._metric(name, device).compute().tolist()
            if successes or not name.startswith((UNSCORED, TRUNCATED)):
                rates[name] = Rate(successes=successes, total=round(total))
        self._metrics.clear()
        if REFUSAL in rates:  # without prompts made for it, every harmless prompt counts
            rates.setdefault(OVER_REFUSAL, rates[REFUSAL])
        return rates

    def _metric(self, name: str, device: torch.device) -> Share:
        if name not in self._metrics:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            metric = Share()
            metric.set_dtype(dtype)
            self._metrics[name] = metric.to(device)
        return self._metrics[name]
