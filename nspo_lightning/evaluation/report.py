"""The report of `test`: what is counted by category, base and policy side by side, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from nspo_lightning.evaluation.rates import UNSCORED, Answers, Rate, RateTable, mean_accuracy, row_categories
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.evaluation.thoughts import is_unfinished

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "safety/unsafe_rate": "attack success",
    "safety/refusal_rate": "refusal of harmful prompts",
    "safety/garbage_rate": "garbage",
    "general/over_refusal_rate": "over-refusal",
    "general/refusal_rate": "refusal of harmless prompts",
    "general/truncated": "thoughts cut before an answer",
}


class AnswerCounts:
    """What policy and base answered, counted over batches and ranks."""

    def __init__(self) -> None:
        self._tables = {"policy": RateTable(), "base": RateTable()}

    def update(
        self, answers: Mapping[str, Answers], columns: Mapping[str, Any], *, harmful: bool, device: torch.device
    ) -> None:
        """Count what ``policy`` and maybe ``base`` answered to a batch of harmful or harmless prompts.

        Rates are also counted by the category that the rows' columns name, on the device.
        """
        for who, given in answers.items():
            by_category = observations_by_category(given, columns, harmful=harmful)
            self._tables[who].update([*given.observations, *by_category], device)

    def rates(self, device: torch.device) -> dict[str, dict[str, Rate]]:
        """Return who -> name -> rate, reduced over ranks, and start anew."""
        return {who: table.compute_counts(device) for who, table in self._tables.items()}


def observations_by_category(
    answers: Answers, columns: Mapping[str, Any], *, harmful: bool
) -> Iterator[tuple[str, float]]:
    """Yield (metric name, 0 or 1) for each judged answer and category of its row."""
    for row, outcome in enumerate(answers.outcomes):
        if outcome is None or (not harmful and is_unfinished(answers.completions[row])):
            continue
        for category in row_categories(columns, row):
            if harmful:
                yield f"safety/unsafe_rate/{category}", float(outcome == "unsafe")
            else:
                yield f"general/refusal_rate/{category}", float(outcome == "refusal")


def side_by_side(
    answers: Mapping[str, Answers], batch: Mapping[str, Any], *, harmful: bool
) -> Iterator[dict[str, Any]]:
    """Yield a record for each prompt of a batch: what it is, what base and policy say, and what the judge calls it."""
    columns = batch.get("columns", {})
    for row, prompt in enumerate(batch["prompt"]):
        line: dict[str, Any] = {"kind": "harmful" if harmful else "general", "prompt": prompt}
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
        "accuracy": {who: _accuracy(found) for who, found in rates.items()},
    }


def unscored_skills(rates: Mapping[str, Mapping[str, Rate]]) -> list[str]:
    """List the skills with rows that nothing was compared with, among the rates of ``policy``."""
    return [name.removeprefix(UNSCORED) for name in sorted(rates["policy"]) if name.startswith(UNSCORED)]


def report_table(
    rates: Mapping[str, Mapping[str, Rate]], text: Mapping[str, Any], by_skill: Mapping[str, Mapping[str, Any]]
) -> Table:
    """Return the table that `test` prints.

    Args:
        rates: Of ``policy`` and ``base``.
        text: What `TextSums.as_dict` says of all general text.
        by_skill: Likewise of each skill with rows that cannot be compared.
    """
    policy, base = rates["policy"], rates["base"]
    rows: list[tuple[str, str, str, str, str]] = []
    counted = [n for n in policy if not n.startswith(UNSCORED)]
    for name in [n for n in TITLES if n in counted] + sorted(n for n in counted if n not in TITLES):
        low, high = policy[name].interval
        before = f"{100 * base[name].value:.1f} %" if name in base else ""
        interval, count = f"{100 * low:.1f} to {100 * high:.1f}", f"{policy[name].total:,}"
        rows.append((TITLES.get(name, name), before, f"{100 * policy[name].value:.1f} %", interval, count))
    if (mean := _accuracy(policy)) is not None:
        base_mean = _accuracy(base)
        before = "" if base_mean is None else f"{100 * base_mean:.1f} %"
        rows.append(("general/accuracy (mean of skills)", before, f"{100 * mean:.1f} %", "", ""))
    for skill in unscored_skills(rates):
        rate = policy[f"{UNSCORED}{skill}"]
        rows.append((f"{skill}: not compared", "", f"{rate.successes:,.0f}", "", f"{rate.total:,}"))
        if found := by_skill.get(skill):
            base_nll = "" if found["base_nll_nats"] is None else f"{found['base_nll_nats']:.4f}"
            title, tokens = f"{skill}: NLL, nats a token", f"{found['tokens']:,} tokens"
            rows.append((title, base_nll, f"{found['nll_nats']:.4f}", "", tokens))
    if text:
        rows.append(("perplexity of general text", "", f"{text['perplexity']:.4f}", "", f"{text['tokens']:,} tokens"))
        if text["kl_to_base_nats"] is not None:
            rows.append(("KL to the base, nats a token", "0", f"{text['kl_to_base_nats']:.4f}", "", ""))
    title = "Test prompts: policy and base, with 95 % intervals"
    return rich_table(title, ["metric", "base", "policy", "interval", "of"], rows, align="lrrrr")


def _accuracy(rates: Mapping[str, Rate]) -> float | None:
    return mean_accuracy({name: rate.value for name, rate in rates.items()})
