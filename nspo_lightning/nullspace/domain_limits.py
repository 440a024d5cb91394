"""Limits on what may happen to single domains, such as harmless prompts that look harmful.

What a step of a given gain moves of the outputs on a domain d is c_d / s^2, as `contrast` has it for all general text;
relative to a step without projection it is what is *promised* of d. A limit says how much it may be. Directions are
chosen for C_w = (1 - sum w_d) C + sum w_d C_d: the w_d are the multipliers of the limits, raised from 0 for domains
over theirs until all hold. C_d has the starts of the domain's own answers in it, with the weight that they have in C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from nspo_lightning.nullspace.contrast import Candidates
from nspo_lightning.nullspace.criteria import NoNullDirections, RankChoice

Choose = Callable[[Mapping[str, Candidates]], dict[str, RankChoice]]
_FIRST_ODDS, _MOST_ODDS = 0.02, 100.0
_HALVINGS = 5


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What is promised of one domain, on the text that directions come from."""

    harm: float
    """What a step of a given gain moves of its outputs (mean square), relative to a step without projection."""
    limit: float | None = None
    """The most that it may be."""
    weight: float = 0.0
    """The weight that the domain got beside C so that the limit holds."""


@dataclass(frozen=True, kw_only=True)
class Limited:
    """Candidates and choices that keep all limits."""

    found: Mapping[str, Candidates]
    choices: dict[str, RankChoice]
    promises: dict[str, Promise]


def promised(found: Mapping[str, Candidates], choices: Mapping[str, RankChoice]) -> dict[str, float]:
    """Return domain -> promised harm; costs and gains are means over the inputs, as the choice has it."""
    free = {n: 0 if choices[n].spare else len(of.values) - choices[n].protected for n, of in found.items()}
    gain = fmean(float(of.gain[free[name] - 1]) if free[name] else 0.0 for name, of in found.items())
    domains = {domain: None for of in found.values() for domain in of.domains}
    harms = {}
    for domain in domains:
        cost = fmean(
            of.domain_cost(domain, free[name]) if free[name] and domain in of.domains else 0.0
            for name, of in found.items()
        )
        plain = fmean(of.domains[domain].unprojected if domain in of.domains else 0.0 for of in found.values())
        harms[domain] = cost / max(gain, 1e-12) ** 2 / plain if plain > 0 else 0.0
    return harms


def within_limits(found: Mapping[str, Candidates], limits: Mapping[str, float], choose: Choose) -> Limited:
    """Choose directions so that no limited domain is promised more harm than its limit.

    Args:
        found: Input -> candidates, which know these domains.
        limits: Domain -> limit; may be empty.
        choose: Chooses how many of each input are free.

    Returns:
        With no more weight on these domains than it takes.

    Raises:
        NoNullDirections: If no weight makes a limit hold; the message names the domain and what could be held.
    """

    def tried(odds: Mapping[str, float]) -> Limited:
        weights = {domain: o / (1 + sum(odds.values())) for domain, o in odds.items() if o > 0}
        turned = {name: of.reordered(weights) for name, of in found.items()} if weights else found
        choices = choose(turned)
        promises = {
            domain: Promise(harm=harm, limit=limits.get(domain), weight=weights.get(domain, 0.0))
            for domain, harm in promised(turned, choices).items()
        }
        return Limited(found=turned, choices=choices, promises=promises)

    odds = dict.fromkeys(limits, 0.0)
    best = nearest = tried(odds)
    while over := _over(best):
        nearest = min(nearest, best, key=_excess)
        if any(odds[domain] >= _MOST_ODDS for domain in over):
            raise NoNullDirections(_cannot_hold(nearest))
        odds |= {domain: min(max(2 * odds[domain], _FIRST_ODDS), _MOST_ODDS) for domain in over}
        best = tried(odds)
    for domain in limits:  # no more than it takes, one domain after another
        low, high = odds[domain] / 2 if odds[domain] > _FIRST_ODDS else 0.0, odds[domain]
        for _ in range(_HALVINGS if high else 0):
            middle = (low + high) / 2
            if _over(now := tried(odds | {domain: middle})):
                low = middle
            else:
                best, high = now, middle
        odds[domain] = high
    return best


def _over(found: Limited) -> list[str]:
    return [domain for domain, p in found.promises.items() if p.limit is not None and p.harm > p.limit]


def _excess(found: Limited) -> float:
    return max(p.harm / p.limit for p in found.promises.values() if p.limit is not None)


def _cannot_hold(found: Limited) -> str:
    """Say what the weights that come nearest to the limits would hold."""
    over = _over(found)
    lines = [
        f"  {domain}: limit {p.limit:.3g}, at best, with a weight of {p.weight:.2g}, it is {p.harm:.3g}; a limit of "
        f"{_rounded_up(p.harm):.3g} can be held"
        for domain, p in found.promises.items()
        if domain in over and p.limit is not None
    ]
    others = [domain for domain, p in found.promises.items() if p.limit is not None and domain not in over]
    beside = f" beside those on {', '.join(others)}" if others else ""
    return (
        f"`domain_limits` can't be held{beside} (harm of a step of a given gain, 1 = without projection):\n"
        + "\n".join(lines)
        + "\nRaise the limit, lower `min_null_share` if it is set, or leave the limit out."
    )


def _rounded_up(value: float) -> float:
    """Return a value with two digits that is larger by a hundredth at least."""
    unit = 10.0 ** (math.floor(math.log10(max(value, 1e-12))) - 1)
    return math.ceil(1.01 * value / unit) * unit
