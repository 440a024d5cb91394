"""How many directions to protect, read off the spectrum of a layer's inputs.

Notation: eigenvalues l_1 >= l_2 >= ... >= l_n >= 0 of the second moment C of a layer's inputs, k protected leading
directions, e(k) = sum_{i>k} l_i / sum l_i the energy left outside them, f(k) = (n - k) / n the null share.

``auto`` weighs both. To gain a fixed first-order improvement of the objective, an update confined to a share f of the
directions must be 1/sqrt(f) times as long as a free one, and per unit of squared length it meets the mean energy of
those directions, proportional to e/f. The squared change of general outputs is therefore proportional to

    rho(k) = e(k) / f(k)^2,      rho(0) = 1 (no projection at all),

and ``auto`` takes the k with the smallest rho: it protects a direction as long as its energy exceeds twice the mean
of what would remain. Channels that carry no input at all (an RMSNorm weight of 0) are no freedom: n and f are over the
others, and one direction of theirs stays free. See docs/nullspace.md for the derivation and the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Criterion = Literal["auto", "energy", "relative", "absolute", "rank", "bound", "null_share", "contrast"]
CRITERIA: tuple[str, ...] = get_args(Criterion)

NEGLIGIBLE_ENERGY = 1e-6
"""Share of the general energy (1e-3 in amplitude) below which ``auto`` prefers freedom to further protection."""

DEFAULT_THRESHOLDS: dict[str, float | None] = {
    "auto": None,
    "energy": 1e-3,
    "relative": 5e-5,
    "absolute": 5e-4,
    "rank": 0.5,
    "bound": 0.03,
    "null_share": 0.5,
    "contrast": None,
}


@dataclass(frozen=True, kw_only=True)
class RankChoice:
    """How many directions are protected, and why."""

    protected: int
    """k, the number of leading directions that an update may not touch."""
    energy_left: float
    """e(k), the share of the general energy outside them."""
    null_share: float
    """f(k), the share of the directions that stay free."""
    gain: float
    """rho(k) = e / f^2: predicted squared change of general outputs, relative to training without projection."""
    reason: str
    """One line for the calibration table."""
    spare: bool = False
    """The only free direction is one that nothing uses: nothing can be learnt in this input (see `contrast`)."""


class NoNullDirections(ValueError):
    """A criterion left no direction free in some layer; the message names layers, criterion and a value that would."""


def energy_left(eigenvalues: Tensor) -> Tensor:
    """Return e(0), e(1), ..., e(n): the share of the energy outside the k leading directions.

    Args:
        eigenvalues: Descending, shape ``(n,)``; negative rounding noise counts as zero.

    Returns:
        float64, shape ``(n + 1,)``, from 1 (or 0 when all eigenvalues are zero) down to 0. Summed from the small end,
        so that a tail of 1e-12 keeps its digits.

    Example:
        >>> energy_left(torch.tensor([6.0, 3.0, 1.0]))
        tensor([1.0000, 0.4000, 0.1000, 0.0000], dtype=torch.float64)
    """
    values = eigenvalues.to(torch.float64).clamp_min(0)
    tails = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    return tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)


def rho(eigenvalues: Tensor, dead: int = 0) -> Tensor:
    """Return the predicted harm (e(k) + 1e-6) / f(k)^2 for k = 0 .. n - dead - 1, float64; see `choose_rank`."""
    live = max(eigenvalues.numel() - dead, 1)
    free = (live - torch.arange(live, dtype=torch.float64, device=eigenvalues.device)) / live
    return (energy_left(eigenvalues)[:live] + NEGLIGIBLE_ENERGY) / free.square()


def choose_rank(
    eigenvalues: Tensor,
    criterion: Criterion = "auto",
    threshold: float | None = None,
    *,
    min_null_share: float = 0.0,
    max_output_change: float | None = None,
    dead: int = 0,
) -> RankChoice:
    """Decide how many leading directions are protected.

    Args:
        eigenvalues: Descending, shape ``(n,)``.
        criterion: ``auto`` minimises rho; ``energy``: e(k) <= threshold; ``relative``: l < threshold * l_1 is null;
            ``absolute``: l < threshold is null; ``rank``: k itself, as a count (int) or a share of n (float below 1);
            ``bound``: sqrt(e(k)) <= threshold, so that an update of spectral norm 1 moves general outputs by at most
            ``threshold`` times the root mean square of the inputs; ``null_share``: at least this share stays free.
        threshold: See ``criterion``; None takes `DEFAULT_THRESHOLDS`.
        min_null_share: With ``auto``, at least this share of the directions stays free.
        max_output_change: With ``auto``, protect at least so much that ``bound`` holds for this value.
        dead: Channels without input, whose directions are the last eigenvectors: no freedom for ``auto``.

    Returns:
        The choice; ``protected == n`` means that no null direction is left, which the caller must refuse.

    Raises:
        ValueError: For an unknown criterion, a threshold out of range, and ``contrast``, which no spectrum decides.
    """
    if criterion == "contrast":
        raise ValueError("criterion='contrast' needs the inputs' second moments, not their spectra: see `contrast`.")
    threshold = check_threshold(criterion, threshold)
    values = eigenvalues.to(torch.float64).clamp_min(0)
    n, left = values.numel(), energy_left(values)
    if values[0] <= 0:
        return RankChoice(protected=0, energy_left=0.0, null_share=1.0, gain=0.0, reason="its inputs are all zero")
    limit = 0.0 if threshold is None else threshold
    reason = f"{criterion} {limit:g}"
    match criterion:
        case "energy":
            k = int((left > limit).sum())
        case "bound":
            k = int((left.sqrt() > limit).sum())
        case "relative":
            k = int((values >= limit * values[0]).sum())
        case "absolute":
            k = int((values >= limit).sum())
        case "rank":
            k = int(limit) if limit >= 1 or limit == 0 else math.ceil(limit * n)
        case "null_share":
            k = min(n - math.ceil(limit * n), int((values > 0).sum()))
        case _:
            k, reason = _auto_rank(values, dead, min_null_share, max_output_change)
    k = min(k, n)
    share = (n - k) / n
    freedom = (n - dead - k) / (n - dead) if k < n - dead else share
    gain = float(left[k]) / freedom**2 if k < n else math.inf
    return RankChoice(protected=k, energy_left=float(left[k]), null_share=share, gain=gain, reason=reason)


def check_threshold(criterion: str, threshold: float | None) -> float | None:
    """Return the threshold to use for a criterion.

    Raises:
        ValueError: For an unknown criterion or a value out of its range.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if criterion in ("auto", "contrast"):
        if threshold is not None:
            raise ValueError(
                f"criterion={criterion!r} reads its cut off the spectrum and takes no `threshold`, got "
                f"{threshold}. State a "
                "limit with `min_null_share` or `max_output_change`, or choose criterion='energy'."
            )
        return None
    value = DEFAULT_THRESHOLDS[criterion] if threshold is None else threshold
    assert value is not None
    upper = math.inf if criterion in ("absolute", "rank") else 1.0
    if not (0 <= value < upper) or (criterion == "rank" and value >= 1 and value != int(value)):
        raise ValueError(
            f"`threshold` of criterion={criterion!r} must lie in [0, {upper:g}), got {value}."
            + (" A rank is a whole number, or a share of the width below 1." if criterion == "rank" else "")
        )
    return value


def value_leaving_one(eigenvalues: Tensor, criterion: str) -> str:
    """Return the setting of a criterion that would leave one null direction, for an error message."""
    values = eigenvalues.to(torch.float64).clamp_min(0)
    n, last = values.numel(), float(values[-1])
    share = float(energy_left(values)[n - 1])
    match criterion:
        case "energy":
            return f"threshold >= {share:.3g}"
        case "bound":
            return f"threshold >= {math.sqrt(share):.3g}"
        case "relative":
            return f"threshold > {last / max(float(values[0]), 1e-300):.3g}"
        case "absolute":
            return f"threshold > {last:.3g}"
        case "null_share":
            return f"threshold >= {1 / n:.3g}"
        case _:
            return f"a rank of at most {n - 1}"


def _auto_rank(values: Tensor, dead: int, min_null_share: float, max_output_change: float | None) -> tuple[int, str]:
    n, left = values.numel(), energy_left(values)
    dead = min(dead, n - 2) if n > 1 else 0  # where all is dead but one, that one is protected
    score = rho(values, dead)
    most = max(min(n - dead - 1, n - math.ceil(min_null_share * n)), 0)
    least = int((left.sqrt() > max_output_change).sum()) if max_output_change is not None else 1
    if least > most:
        raise NoNullDirections(
            f"no cut leaves {min_null_share:.3g} of {n} directions free and moves general outputs by at most "
            f"{max_output_change}: the bound needs {least} protected directions. Relax one of the two."
        )
    k = least + int(score[least : most + 1].argmin()) if n > 1 else 0
    reason = f"least e/f^2: {float(score[k]):.2g}"
    if k == least and max_output_change is not None:
        reason += ", held by max_output_change"
    elif k == most:
        reason += ", held by min_null_share" if min_null_share else ", one direction left"
    elif float(score[k]) > 0.5:
        reason += " (flat, little to gain)"
    return k, reason
