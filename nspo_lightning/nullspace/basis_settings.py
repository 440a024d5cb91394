"""The settings that decide a basis, given the second moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from nspo_lightning.nullspace.basis import Form, Subspace
from nspo_lightning.nullspace.criteria import Criterion, RankChoice, check_threshold, choose_rank
from nspo_lightning.nullspace.domains import STARTS, domain_shares, is_apart, text_of

CONTRAST_START_WEIGHT = 0.9
"""Default `start_weight` of settings that ask what is to be learnt: whether a policy answers is decided at the start of
its answer."""


@dataclass(frozen=True, kw_only=True)
class BasisSettings:
    """What decides a basis, given the second moments.

    Attributes:
        criterion: What decides how many directions are protected, see `criteria`.
        threshold: Of the criterion; None = its default (`DEFAULT_THRESHOLDS`).
        form: ``hard`` cuts directions off, ``soft`` damps them.
        softness: Of the soft form, in units of the mean eigenvalue; positive, larger is freer.
        subspace: Which directions are protected, see `build_basis`.
        min_null_share: With ``auto`` and ``contrast``, the least share of the directions that stays free, in [0, 1).
        max_output_change: With ``auto`` and ``contrast``, the most that an update of norm 1 may move general outputs,
            relative to the inputs; None = no limit.
        domain_weights: Domain -> its weight; None = all the same.
        without_domains: Domains that are left out.
        start_weight: Weight of the starts of answers, in [0, 1]; None = see `starts`.
        domain_limits: Domain -> the most harm that ``contrast`` may promise there, 1 = without projection.
        seed: Seed of the random subspace and of sketches.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    criterion: Criterion = "auto"
    threshold: float | None = None
    form: Form = "hard"
    softness: float = 0.01
    subspace: Subspace = "null"
    min_null_share: float = 0.0
    max_output_change: float | None = None
    domain_weights: Mapping[str, float] | None = None
    without_domains: Sequence[str] = ()
    start_weight: float | None = None
    domain_limits: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_limits()
        check_threshold(self.criterion, self.threshold)
        for name, value, allowed in (("form", self.form, Form), ("subspace", self.subspace, Subspace)):
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(allowed))}, got {value!r}.")
        if not 0 <= self.min_null_share < 1:
            raise ValueError(f"`min_null_share` must lie in [0, 1), got {self.min_null_share}.")
        if not self.softness > 0:
            raise ValueError(f"`softness` must be positive, got {self.softness}.")
        if self.start_weight is not None and not 0 <= self.start_weight <= 1:
            raise ValueError(f"`start_weight` must be a share in [0, 1], got {self.start_weight}. 0.9 is a good start.")
        if self.criterion == "contrast" and self.form == "soft":
            raise ValueError("criterion='contrast' chooses what is cut; form='soft' has no cut. Choose one of them.")
        if self.subspace == "to_learn" and (self.criterion == "contrast" or self.form == "soft"):
            raise ValueError(
                "subspace='to_learn' starts in as many leading directions of the prompts that are trained on as a "
                "spectrum says: choose criterion='rank' (or another one that looks at eigenvalues) and form='hard'."
            )
        if self.subspace == "weights" and (self.criterion == "contrast" or self.form == "soft"):
            raise ValueError(
                "subspace='weights' takes the weights' directions, as many as a spectrum says: choose criterion='auto' "
                "(or another one that looks at eigenvalues) and form='hard'."
            )

    def _check_limits(self) -> None:
        limits = self.domain_limits or {}
        if limits and self.criterion != "contrast":
            raise ValueError(
                f"`domain_limits` are kept by criterion='contrast', which knows what a step of a given gain costs; got "
                f"criterion={self.criterion!r}. Choose contrast, or weigh domains by `domain_weights`."
            )
        for domain, limit in limits.items():
            if not 0 < limit < math.inf:
                raise ValueError(
                    f"`domain_limits` of {domain!r} must be positive, got {limit}: the harm promised there, 1 = what "
                    "training without projection does. 0.02 is a start; `calibrate` prints what is promised now."
                )
            if domain in self.without_domains:
                raise ValueError(f"{domain!r} is in `domain_limits` and in `without_domains`. Name it in one of them.")

    @property
    def starts(self) -> float:
        """The weight of the starts of answers that is in force, see `domains`."""
        if self.start_weight is not None:
            return self.start_weight
        return CONTRAST_START_WEIGHT if self.needs_text_to_learn else 0.0

    @property
    def needs_text_to_learn(self) -> bool:
        """Whether the prompts that are trained on are calibrated on too."""
        return self.criterion == "contrast" or self.subspace == "to_learn"

    @property
    def asker(self) -> str:
        """Name the setting that needs these prompts, for messages."""
        return "subspace='to_learn'" if self.subspace == "to_learn" else f"criterion={self.criterion!r}"

    def shares(self, domains: Iterable[str]) -> dict[str, float]:
        """Return the share of each domain in what is protected, see `domain_shares`.

        Raises:
            ValueError: If a limit is set on a domain that calibration did not see, or if starts of answers have a
                weight and calibration saw none.
        """
        domains = list(domains)
        known = {name for name in domains if not is_apart(name)}
        if unknown := sorted(set(self.domain_limits or ()) - known):
            raise ValueError(f"`domain_limits` names {unknown}; calibration saw {sorted(known)}.")
        if self.start_weight and STARTS not in domains:
            raise ValueError(
                f"`start_weight` is {self.start_weight:g}, and no calibration batch says where answers start: give "
                "`answer_starts` (True there, shape as the mask) in each batch, or leave `start_weight` out."
            )
        return domain_shares(domains, self.domain_weights, without=self.without_domains, start_weight=self.starts)

    def leaves_out(self, domain: str) -> bool:
        """Return whether a domain has no share in what is protected, and so its answers' starts have none either."""
        name = text_of(domain)
        if is_apart(name):
            return False
        weights = self.domain_weights
        return name in self.without_domains or (weights is not None and not weights.get(name, 0.0) > 0)

    def choose(self, values: Tensor, dead: int = 0) -> RankChoice:
        """Return how many directions of a spectrum are protected, in the hard form; see `choose_rank`."""
        return choose_rank(
            values,
            self.criterion,
            self.threshold,
            min_null_share=self.min_null_share,
            max_output_change=self.max_output_change,
            dead=dead,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for fingerprints and files."""
        values = dict(vars(self))
        values["domain_weights"] = dict(self.domain_weights) if self.domain_weights else None
        values["domain_limits"] = dict(self.domain_limits) if self.domain_limits else None
        values["without_domains"] = list(self.without_domains)
        return values
