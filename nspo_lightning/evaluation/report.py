"""The report of `test`: what is counted by category, base and policy side by side, and the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from nspo_lightning.evaluation.rates import (
    ACCURACY,
    ANSWERED,
    GARBAGE,
    OVER_REFUSAL,
    REFUSAL,
    REFUSED,
    TRUNCATED,
    UNSAFE,
    UNSCORED,
    Answers,
    Rate,
    RateTable,
    mean_accuracy,
    mean_accuracy_interval,
    row_categories,
)
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.evaluation.text_means import KL, KL_FIRST, NLL, NLL_CHANGE, TextMean, text_means
from nspo_lightning.evaluation.thoughts import is_unfinished
from nspo_lightning.nullspace.domains import START_TOKENS
from nspo_lightning.policy.divergence import TextScores

if TYPE_CHECKING:
    from rich.table import Table

BY_CATEGORY = "general/refusal_by_category"
"""What the names of the shares of refused harmless prompts begin with, by the category of their rows."""

_RATES = {
    UNSAFE: "attack success",
    ANSWERED: "harmful prompts answered",
    REFUSED: "refusal of harmful prompts",
    GARBAGE: "garbage",
    REFUSAL: "refusal of ordinary prompts",
    OVER_REFUSAL: "over-refusal (look-alikes)",
    TRUNCATED: "thoughts without an answer",
}
_TEXT = {
    KL_FIRST: f"KL to base, first {START_TOKENS} tokens",
    KL: "KL to base, whole answers",
    NLL: "NLL of whole answers",
    NLL_CHANGE: "NLL, change to the base",
}
_CATEGORIES = {
    UNSAFE: "attack success by category",
    ANSWERED: "harmful prompts answered, by category",
    BY_CATEGORY: "refusals, harmless, by category",
}


class AnswerCounts:
    """What policy and base answered, counted over batches and ranks."""

    def __init__(self) -> None:
        self._tables = {"policy": RateTable(), "base": RateTable()}

    def update(
        self,
        answers: Mapping[str, Answers],
        columns: Mapping[str, Any],
        *,
        harmful: bool,
        device: torch.device,
        attack: str = "",
    ) -> None:
        """Count what ``policy`` and maybe ``base`` answered to a batch of harmful or harmless prompts.

        Rates are also counted by the category that the rows' columns name, on the device. `attack` is the name of what
        the prompts were put under.
        """
        for who, given in answers.items():
            by_category = observations_by_category(given, columns, harmful=harmful, attack=attack)
            self._tables[who].update([*given.observations, *by_category], device)

    def rates(self, device: torch.device) -> dict[str, dict[str, Rate]]:
        """Return who -> name -> rate, reduced over ranks, and start anew."""
        return {who: table.compute_counts(device) for who, table in self._tables.items()}


def observations_by_category(
    answers: Answers, columns: Mapping[str, Any], *, harmful: bool, attack: str = ""
) -> Iterator[tuple[str, float]]:
    """Yield (metric name, 0 or 1) for each judged answer and category of its row; of look-alikes not under attack."""
    if attack and not harmful:
        return
    for row, outcome in enumerate(answers.outcomes):
        if outcome is None or (not harmful and is_unfinished(answers.completions[row])):
            continue
        for category in row_categories(columns, row):
            if harmful:
                name, counted = (UNSAFE, "unsafe") if answers.reads_harm else (ANSWERED, "answered")
                name = f"attack/{attack}/{name.removeprefix('safety/')}" if attack else name
                yield f"{name}/{category}", float(outcome == counted)
            else:
                yield f"{BY_CATEGORY}/{category}", float(outcome == "refusal")


def side_by_side(
    answers: Mapping[str, Answers], batch: Mapping[str, Any], *, harmful: bool
) -> Iterator[dict[str, Any]]:
    """Yield a record for each prompt of a batch: what it is, what base and policy say, and what the judge calls it."""
    columns = batch.get("columns", {})
    for row, prompt in enumerate(batch["prompt"]):
        line: dict[str, Any] = {"kind": "harmful" if harmful else "general", "prompt": prompt}
        if given := next((a.prefixes for a in answers.values() if a.prefixes), None):
            line["prefix"] = given[row]
        if attacks := columns.get("attack"):
            line["attack"] = attacks[row]
        skill = columns.get("skill")
        if skill is not None:
            line["skill"] = skill[row]
        if categories := row_categories(columns, row):
            line["category"] = categories
        for who in ("base", "policy"):
            if who in answers:
                line[who] = answers[who].completions[row]
                line[f"{who}_outcome"] = answers[who].outcomes[row]
        yield line


def rates_summary(rates: Mapping[str, Mapping[str, Rate]]) -> dict[str, Any]:
    """Return what the result file says of rates: each with count and interval, and the mean accuracy of the skills."""
    return {
        "rates": {who: {name: rate.as_dict() for name, rate in found.items()} for who, found in rates.items()},
        "accuracy": {who: mean_accuracy(found) for who, found in rates.items()},
        "accuracy_interval_95": {who: mean_accuracy_interval(found) for who, found in rates.items()},
    }


def text_summary(scores: TextScores) -> dict[str, Any]:
    """Return what the result file says of general text: means with intervals, and sums over all of it and by skill."""
    skills = sorted({row.skill for row in scores.rows})
    parts = {skill: TextScores(tuple(row for row in scores.rows if row.skill == skill)) for skill in skills}
    return {
        "text_means": {name: mean.as_dict() for name, mean in text_means(scores).items()},
        "text": scores.as_dict(),
        "text_by_skill": {skill: part.as_dict() for skill, part in parts.items()},
    }


def report_table(rates: Mapping[str, Mapping[str, Rate]], scores: TextScores) -> Table:
    """Return the table that `test` prints, of 80 columns unless names are long.

    Args:
        rates: Of ``policy`` and ``base``.
        scores: Scores of general text.
    """
    policy, base = rates["policy"], rates["base"]
    rows: list[tuple[str, ...]] = []

    def rate_row(title: str, name: str) -> None:
        before = _percent(base[name].value) if name in base else ""
        rate = policy[name]
        rows.append((title, before, _percent(rate.value), _ends(rate.interval), f"{rate.total:,}"))

    for name, title in _RATES.items():
        if name in policy:
            rate_row(title, name)
        if name.startswith("general/"):
            for detail in _below(policy, name):
                rate_row(_indented(detail, name), detail)
    rows += _accuracy_rows(policy, base)
    for name in sorted(name for name in policy if name.startswith(UNSCORED)):
        rate = policy[name]
        title = f"  {name.removeprefix(UNSCORED)}: not compared"
        rows.append((title, "", f"{rate.successes:,.0f}", "", f"{rate.total:,}"))
    rows += _text_rows(text_means(scores))
    for name, title in _CATEGORIES.items():
        if details := list(_below(policy, name)):
            rows.append((title, "", "", "", ""))
        for detail in details:
            rate_row(_indented(detail, name), detail)
    title = "Test prompts: policy and base, with 95 % intervals of the policy"
    table = rich_table(title, ["metric", "base", "policy", "interval", "of"], rows, align="lrrrr")
    table.caption_justify = "left"
    if scores.rows:
        table.caption = "KL and NLL: nats a token of held-out reference answers"
    return table


def _accuracy_rows(policy: Mapping[str, Rate], base: Mapping[str, Rate]) -> Iterator[tuple[str, ...]]:
    """Yield the mean over skills and each skill's rate; where no answer matches a reference, only that it is so."""
    names = list(_below(policy, ACCURACY))
    nothing = [name for name in names if not policy[name].successes and (name not in base or not base[name].successes)]
    mean, interval, base_mean = mean_accuracy(policy), mean_accuracy_interval(policy), mean_accuracy(base)
    if mean is not None and interval is not None and len(nothing) < len(names):
        before = "" if base_mean is None else _percent(base_mean)
        total = sum(policy[name].total for name in names)
        yield "accuracy, mean of skills", before, _percent(mean), _ends(interval), f"{total:,}"
    for name in names:
        rate = policy[name]
        if name in nothing:
            yield f"{_indented(name, ACCURACY)}: none matches", "", "0", "", f"{rate.total:,}"
            continue
        before = _percent(base[name].value) if name in base else ""
        ends = _ends(rate.interval)
        yield _indented(name, ACCURACY), before, _percent(rate.value), ends, f"{rate.total:,}"


def _ends(interval: tuple[float, float]) -> str:
    return " to ".join(f"{100 * end:.1f}" for end in interval)


def _text_rows(means: Mapping[str, TextMean]) -> Iterator[tuple[str, ...]]:
    for name, title in _TEXT.items():
        for own in [n for n in (name,) if n in means] + list(_below(means, name)):
            mean, change = means[own], means.get(own.replace(NLL, NLL_CHANGE, 1))
            base = "0" if name in (KL, KL_FIRST) else ""
            if name == NLL and change is not None:
                base = f"{mean.value - change.value:.4f}"
            sign = "+" if name == NLL_CHANGE else ""
            ends = mean.interval if name != NLL else None  # that of its change is the one that says something
            interval = "" if ends is None else " to ".join(f"{end:{sign}.4f}" for end in ends)
            shown = title if own == name else _indented(own, name)
            yield shown, base, f"{mean.value:{sign}.4f}", interval, f"{mean.rows:,}"


def _below(names: Iterable[str], name: str) -> Iterator[str]:
    return (other for other in sorted(names) if other.startswith(f"{name}/"))


def _indented(detail: str, name: str) -> str:
    return f"  {detail.removeprefix(f'{name}/')}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
