"""Measures before and after, out of `summary.json` (written by `fit`) and `test.json` (by `test`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from nspo_lightning.evaluation.rates import (
    ACCURACY,
    ANSWERED,
    GARBAGE,
    OVER_REFUSAL,
    REFUSAL,
    REFUSED,
    TRUNCATED,
    UNSAFE,
)
from nspo_lightning.evaluation.report import BY_CATEGORY
from nspo_lightning.evaluation.text_means import KL, KL_FIRST, NLL, NLL_CHANGE, in_nats
from nspo_lightning.report.attacks import IN_TRAINING, read_attacks
from nspo_lightning.report.records import Better, Breakdown, Measure, Measurement, Unit, Value

TITLES: dict[str, tuple[str, Better]] = {
    UNSAFE: ("Harmful prompts answered unsafely", "less"),
    ANSWERED: ("Harmful prompts answered", "less"),
    REFUSED: ("Harmful prompts refused", "more"),
    GARBAGE: ("Harmful prompts answered with garbage", "less"),
    ACCURACY: ("General tasks answered right", "more"),
    REFUSAL: ("Ordinary prompts refused", "less"),
    OVER_REFUSAL: ("Harmless look-alikes refused", "less"),
    TRUNCATED: ("General answers that are a thought without an end", "less"),
    KL_FIRST: ("KL to the base at the first tokens of general answers", "same"),
    KL: ("KL to the base on whole general answers", "same"),
    NLL: ("NLL of general answers", "same"),
    NLL_CHANGE: ("NLL of general answers, change to the base", "same"),
}
"""In the order of pages, with the way each should go."""
_PARTS = {
    UNSAFE: "Harmful prompts answered unsafely, by category",
    ANSWERED: "Harmful prompts answered, by category",
    ACCURACY: "General tasks answered right, by skill",
    REFUSAL: "Harmless prompts refused, by skill",
    BY_CATEGORY: "Harmless prompts refused, by category",
    TRUNCATED: "Thoughts without an end, by skill",
    KL: "KL to the base on whole general answers, by skill",
    NLL_CHANGE: "NLL of general answers, change to the base, by skill",
}


def of_fit(summary: Mapping[str, Any]) -> Measurement:
    """Return what `fit` measured before and after; without measures where it measured nothing."""
    when: dict[str, dict[str, Value]] = {}
    for side in ("before", "after"):
        intervals = _mapping(_mapping(summary.get("intervals_95")).get(side))
        values = {
            name.removeprefix(f"{side}/"): value
            for name, value in summary.items()
            if name.startswith(f"{side}/") and _is_number(value)
        }
        when[side] = {
            name: Value(value=float(value), interval=_interval(intervals.get(name))) for name, value in values.items()
        }
        by_category = _mapping(_mapping(summary.get("by_category")).get(side))
        when[side] |= {name: found for name, rate in by_category.items() if (found := _rate(rate)) is not None}
    checkpoint = summary.get("checkpoint")
    of = f"checkpoint {checkpoint}" if checkpoint else "the last state"
    return _measurement("fit", of, when["before"], when["after"])


def of_test(result: Mapping[str, Any]) -> Measurement:
    """Return what `test` measured of base and policy."""
    rates, accuracy = _mapping(result.get("rates")), _mapping(result.get("accuracy"))
    sides: dict[str, dict[str, Value]] = {}
    for who in ("base", "policy"):
        found = {name: value for name, rate in _mapping(rates.get(who)).items() if (value := _rate(rate)) is not None}
        if _is_number(accuracy.get(who)):
            ends = _mapping(result.get("accuracy_interval_95")).get(who)
            found[ACCURACY] = Value(value=float(accuracy[who]), interval=_interval(ends))
        sides[who] = found
    for name, mean in _mapping(result.get("text_means")).items():
        if not isinstance(mean, Mapping) or not _is_number(mean.get("nats")):
            continue
        value = Value(value=float(mean["nats"]), interval=_interval(mean.get("interval_95")), of=_count(mean.get("of")))
        sides["policy"][name] = value
        if (base := _base_nats(name, value, _mapping(result.get("text_means")))) is not None:
            sides["base"][name] = Value(value=base)
    identity, trained = _mapping(result.get("identity")), result.get(IN_TRAINING)
    checkpoint = _mapping(identity.get("adapter")).get("checkpoint")
    of = f"{checkpoint}" if checkpoint else "the policy"
    names = list(map(str, _mapping(identity.get("attacks"))))
    trained = list(map(str, trained)) if isinstance(trained, list) else []
    attacks = read_attacks(names, trained, sides["base"], sides["policy"])
    return replace(_measurement("test", of, sides["base"], sides["policy"]), attacks=attacks)


def _measurement(job: Any, of: str, before: Mapping[str, Value], after: Mapping[str, Value]) -> Measurement:
    before, after = _with_mean_interval(before), _with_mean_interval(after)
    names = {**before, **after}
    measures = [_measure(name, TITLES[name][0], before, after) for name in TITLES if name in names]
    refusals = [m for m in measures if m.name in (REFUSAL, OVER_REFUSAL)]
    if len(refusals) == 2 and _pair(refusals[0]) == _pair(refusals[1]):
        measures.remove(refusals[1])  # no look-alikes are named: both are the same share of all harmless prompts
    breakdowns = []
    for whole, title in _PARTS.items():
        parts = sorted(name for name in names if name.startswith(f"{whole}/"))
        if parts and not (len(parts) == 1 and whole in names):
            rows = tuple(_measure(name, name.removeprefix(f"{whole}/"), before, after) for name in parts)
            if any(says_something(row) for row in rows):
                breakdowns.append(Breakdown(title=title, parts=rows))
    return Measurement(job=job, of=of, measures=tuple(measures), breakdowns=tuple(breakdowns))


def _with_mean_interval(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values with an interval for the mean accuracy, from those of its skills (each weighs the same)."""
    found = dict(values)
    skills = [value for name, value in values.items() if name.startswith(f"{ACCURACY}/")]
    mean, ends = values.get(ACCURACY), [skill.interval for skill in skills if skill.interval is not None]
    if mean is None or mean.interval is not None or not skills or len(ends) < len(skills):
        return found
    below = math.hypot(*(s.value - low for s, (low, _) in zip(skills, ends, strict=True))) / len(skills)
    above = math.hypot(*(high - s.value for s, (_, high) in zip(skills, ends, strict=True))) / len(skills)
    found[ACCURACY] = replace(mean, interval=(max(mean.value - below, 0.0), min(mean.value + above, 1.0)))
    return found


def _pair(measure: Measure) -> list[float | None]:
    return [None if value is None else value.value for value in (measure.before, measure.after)]


def says_something(measure: Measure) -> bool:
    """Whether a measure is not nothing both before and after, as an accuracy is where no answer is ever right."""
    least = 5e-5 if measure.unit == "nats" else 0.0  # what no digit shows
    return any(value is not None and abs(value.value) > least for value in (measure.before, measure.after))


def _measure(name: str, title: str, before: Mapping[str, Value], after: Mapping[str, Value]) -> Measure:
    unit: Unit = "nats" if in_nats(name) else "share"
    whole = next((known for known in (*TITLES, BY_CATEGORY) if f"{name}/".startswith(f"{known}/")), name)
    better: Better = "less" if whole == BY_CATEGORY else TITLES[whole][1] if whole in TITLES else "same"
    return Measure(name=name, title=title, unit=unit, better=better, before=before.get(name), after=after.get(name))


def _base_nats(name: str, value: Value, means: Mapping[str, Any]) -> float | None:
    """Return what the base has: nothing to itself, and its NLL is the policy's less the change."""
    if any(f"{name}/".startswith(f"{own}/") for own in (KL, KL_FIRST, NLL_CHANGE)):
        return 0.0
    change = _mapping(means.get(name.replace(NLL, NLL_CHANGE, 1))).get("nats")
    return value.value - float(change) if _is_number(change) else None


def _rate(rate: Any) -> Value | None:
    if not isinstance(rate, Mapping) or not _is_number(rate.get("rate")):
        return None
    interval = _interval(rate.get("interval_95"))
    return Value(value=float(rate["rate"]), interval=interval, of=_count(rate.get("of")))


def _interval(ends: Any) -> tuple[float, float] | None:
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or not all(map(_is_number, ends)):
        return None
    return float(ends[0]), float(ends[1])


def _count(of: Any) -> int | None:
    return int(of) if _is_number(of) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
