"""Several calibration domains: weighting, union, leaving one out, and the angles between them.

Each domain d has a second moment C_d of its own. The default combination is the plain mean of the C_d, so that a
domain with more text does not drown the others.

Three domains are no kind of text. `TO_LEARN` holds the prompts that are trained on: the criterion ``contrast`` asks
what they need. `STARTS` holds once more the rows at the start of answers, where a policy decides whether to answer: one
position in a hundred, so that the mean over positions hardly sees them. `STARTS_TO_LEARN` holds the *means* of the
prompts that are trained on at each of these positions, see `start_means`: a prompt's topic is its own, what it shares
with the others is what is to be learnt. Where these starts are known, `TO_LEARN` itself is not summed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nspo_lightning.nullspace.criteria import energy_left

TO_LEARN = "to learn"
STARTS = "answer starts"
STARTS_TO_LEARN = "answer starts, to learn"
START_TOKENS = 3
"""So many tokens of an answer are its start, where it is decided whether to refuse; the first one counts."""
APART = frozenset({TO_LEARN, STARTS, STARTS_TO_LEARN})
"""Domains that a user's weights do not name, and with them the starts of single domains (`starts_of`)."""
_OF = f"{STARTS} of "


def starts_of(domain: str) -> str:
    """Return the name of the starts of one domain's answers, which are kept apart where a limit is set on it."""
    return _OF + domain


def text_of(domain: str) -> str:
    """Return the domain whose answers' starts a name is of (`starts_of`); any other name as it is.

    Example:
        >>> text_of(starts_of("code")), text_of("code")
        ('code', 'code')
    """
    return domain.removeprefix(_OF)


def are_starts(domain: str) -> bool:
    """Return whether a name is that of answers' starts, of all text to protect or of one domain."""
    return domain == STARTS or domain.startswith(_OF)


def is_apart(domain: str) -> bool:
    """Return whether a name is none that a user's weights and limits give; see `APART`."""
    return domain in APART or are_starts(domain)


def combine(moments: Mapping[str, Tensor], shares: Mapping[str, float], *, in_place: bool = False) -> Tensor:
    """Return the weighted mean of the domains' second moments.

    Args:
        moments: Domain -> C_d, shape ``(width, width)``.
        shares: Domain -> its share, see `domain_shares`; the others are left out.
        in_place: In the memory of the first of them; its own moment is lost.

    Returns:
        Shape ``(width, width)``.
    """
    (first, share), *others = shares.items()
    result = moments[first].mul_(share) if in_place else moments[first] * share
    for name, share in others:
        result.add_(moments[name], alpha=share)
    return result


def domain_shares(
    domains: Iterable[str],
    weights: Mapping[str, float] | None = None,
    *,
    without: Sequence[str] = (),
    start_weight: float = 0.0,
) -> dict[str, float]:
    """Return the share of each domain in the second moment that is protected; they sum up to 1.

    Args:
        domains: All that calibration saw.
        weights: Domain -> weight; None = equal.
        without: Domains to leave out.
        start_weight: The share of `STARTS`, if there are any; the other domains have the rest. Weights say nothing of
            how the domains' starts are mixed there; a domain that is left out has none among them (`leaves_out`).

    Raises:
        ValueError: If a name is unknown or nothing is left to combine.

    Example:
        >>> domain_shares(["code", "facts", "maths"], {"code": 3.0, "facts": 1.0})
        {'code': 0.75, 'facts': 0.25}
    """
    seen = list(domains)
    known = [name for name in seen if not is_apart(name)]
    unknown = (set(weights or {}) | set(without)) - set(known)
    if unknown:
        raise ValueError(f"Unknown domains {sorted(unknown)}; calibration saw {sorted(known)}.")
    asked = {name: 1.0 if weights is None else float(weights.get(name, 0.0)) for name in known if name not in without}
    total = sum(asked.values())
    if total <= 0:
        raise ValueError(f"No domain is left to combine out of {sorted(known)}.")
    starts = start_weight if STARTS in seen else 0.0
    shares = {name: (1 - starts) * weight / total for name, weight in asked.items() if weight > 0}
    return {name: share for name, share in (*shares.items(), (STARTS, starts)) if share > 0}


def shares_to_learn(domains: Iterable[str]) -> dict[str, float]:
    """Return the shares of the domains in the second moment that is to be learnt from; answers' starts where known.

    Empty where calibration saw no such text.
    """
    seen = set(domains)
    return next(({name: 1.0} for name in (STARTS_TO_LEARN, TO_LEARN) if name in seen), {})


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two subspaces, descending.

    Args:
        first: Orthonormal columns, shape ``(width, a)``.
        second: Orthonormal columns, shape ``(width, b)``.

    Returns:
        Shape ``(min(a, b),)``; 1 = a common direction, 0 = orthogonal.

    Example:
        >>> principal_cosines(torch.eye(3)[:, :1], torch.eye(3)[:, 1:])
        tensor([0.])
    """
    cosines: Tensor = torch.linalg.svdvals(first.T @ second)
    return cosines.clamp(0, 1)


def domain_report(moments: Mapping[str, Tensor], share: float = 0.99) -> dict[str, dict[str, float]]:
    """Compare domains pairwise: how much of one's energy lies in the leading directions of another.

    Args:
        moments: Domain -> C_d, shape ``(width, width)``.
        share: Energy share that a domain's leading directions hold.

    Returns:
        ``"a -> b"`` -> ``covered`` (share of b's energy inside a's leading directions: what protecting a alone would
        protect of b), ``mean_cosine`` and ``largest_angle_deg`` between the two leading subspaces.
    """
    leading: dict[str, Tensor] = {}
    for name, moment in moments.items():
        values, vectors = torch.linalg.eigh(moment.to(torch.float64))
        count = max(int((energy_left(values.flip(0)) > 1 - share).sum()), 1)
        leading[name] = vectors.flip(1)[:, :count]
    report: dict[str, dict[str, float]] = {}
    for a, b in itertools.permutations(moments, 2):
        other = moments[b].to(torch.float64)
        held = (leading[a].T @ other @ leading[a]).trace() / other.trace().clamp_min(1e-300)
        cosines = principal_cosines(leading[a], leading[b])
        report[f"{a} -> {b}"] = {
            "covered": float(held),
            "mean_cosine": float(cosines.mean()),
            "largest_angle_deg": float(torch.rad2deg(torch.arccos(cosines[-1]))),
        }
    return report
