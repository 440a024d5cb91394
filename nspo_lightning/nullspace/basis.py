"""Bases of what is protected and of what is null, from a second moment C = U diag(l) U^T.

A basis keeps whichever is thinner, the protected directions U_k (width x k) or the null directions V
(width x (width - k)), never the dense projector. Shapes: width = input features of the layers that share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nspo_lightning.nullspace.criteria import RankChoice
from nspo_lightning.nullspace.partial import LEAST_WIDTH, MOST_WIDTH, FindCut, leading_eigenpairs

Form = Literal["hard", "soft"]
Subspace = Literal["null", "random", "protected", "weights", "to_learn"]

_FLOAT64_WIDTH = 4096
SOFT_TRUNCATION = 0.1
"""``soft`` leaves directions alone whose eigenvalue is below this share of m: they move outputs by less anyway."""

NEARLY_DEAD = 1e-2
"""Of the median channel's energy: a tenth of its amplitude."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenpairs of a second moment, leading first."""

    values: Tensor
    """Shape ``(width,)``, descending, float64, never negative; on the CPU."""
    vectors: Tensor
    """Shape ``(width, width)``, or ``(width, m)`` for a partial one, orthonormal columns in the order of ``values``."""
    tokens: int
    """Rows that the moment was taken over."""
    outside: float = 0.0
    """What must be added to a value outside the vectors to bound the energy of any direction there (sketches)."""
    dead: int = 0
    """Channels without input, see `dead_channels`, as far as known (not to sketches)."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What the layers with one common input may not do.

    With ``complement`` False the operator applied to rows is I - Z diag(w) Z^T, with Z = ``vectors`` the protected
    directions and w = ``weights`` (None = ones, the hard projection). With ``complement`` True it is Z Z^T, Z the
    null directions.
    """

    vectors: Tensor
    """Z, shape ``(width, m)``, orthonormal columns, float32."""
    weights: Tensor | None = None
    """w, shape ``(m,)``, in (0, 1], for the soft form."""
    complement: bool = False
    values: Tensor
    """All eigenvalues, shape ``(width,)``, descending, float64, on the CPU."""
    choice: RankChoice
    tokens: int
    subspace: Subspace = "null"
    outside: float = 0.0
    """See `Spectrum.outside`."""
    oblique: bool = False
    """The free directions are not C's eigenvectors: they share energy with the protected ones (see `contrast`)."""
    trace: float | None = None
    """Trace of C where ``values`` do not sum up to it."""

    @property
    def width(self) -> int:
        """Input features."""
        return self.vectors.shape[0]

    @property
    def protected(self) -> int:
        """Number of directions that updates avoid (in the soft form: that they are damped in)."""
        return self.choice.protected

    @property
    def null_dims(self) -> int:
        """Number of directions that updates are free in."""
        return self.width - self.protected

    @property
    def form(self) -> Form:
        """``hard`` or ``soft``."""
        return "hard" if self.weights is None else "soft"

    @property
    def energy(self) -> float:
        """Mean squared norm of the inputs, the trace of C."""
        return float(self.values.sum()) if self.trace is None else self.trace

    @property
    def largest_energy(self) -> float:
        """Bound on the energy of any direction."""
        return float(self.values.max())

    @property
    def condition(self) -> float:
        """l_1 / l_k: how far apart the largest and the smallest protected energies are."""
        k = min(max(self.protected, 1), self.width)
        last = float(self.values[k - 1])
        return float(self.values[0]) / last if last > 0 else float("inf")

    def to(self, device: torch.device | str) -> Basis:
        """Return the basis with its vectors on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, vectors=self.vectors.to(device), weights=weights)


def working_dtype(width: int, device_type: str) -> torch.dtype:
    """Return what a second moment of a width is decomposed in: float64 up to 4,096 where the device has it."""
    return torch.float64 if width <= _FLOAT64_WIDTH and device_type != "mps" else torch.float32


def decompose(
    moment: Tensor,
    *,
    tokens: int,
    resolution: float = torch.finfo(torch.float64).eps,
    rounded_energy: float = math.inf,
    find_cut: FindCut | None = None,
    count: int | None = None,
) -> Spectrum:
    """Diagonalise a second moment.

    Where the moment is, and in `working_dtype`: float32 above a width of 4,096, where float64 would cost more than the
    calibration itself. Where the cut is known to need leading eigenpairs only, these alone are computed, in float64
    (see `partial`), unless they cannot be had as exactly as by the full decomposition.

    Args:
        moment: Symmetric, positive semi-definite up to rounding, shape ``(width, width)``.
        tokens: Rows that it was taken over.
        resolution: Relative rounding noise in it, in units of ``rounded_energy`` or of the largest eigenvalue, if
            that is less.
        rounded_energy: Trace of the part of the moment that was rounded so.
        find_cut: From eigenvalues to the number of protected directions, where leading eigenvalues and the sum of the
            others decide it; None = all eigenpairs are wanted.
        count: That number, where it is known beforehand.

    Returns:
        The eigenpairs. Eigenvalues under the rounding noise are set to zero where that is float64's, and to the noise
        itself where it is larger: then they may be that large, and bounds must count them.
        With ``find_cut`` possibly the protected ones only, and a tail that holds the energy of the others.

    Raises:
        ValueError: If the moment is not a square matrix of finite numbers.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"A second moment must be a square matrix, got shape {tuple(moment.shape)}.")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(
            "The second moment holds NaN or infinite values: likely a forward pass that overflows in half precision "
            "(calibrate in bfloat16 or float32), or an input that is not finite."
        )
    dead = dead_channels(moment)
    partly = LEAST_WIDTH <= moment.shape[0] <= MOST_WIDTH and moment.dtype == torch.float64
    if find_cut is not None and partly:
        found = leading_eigenpairs(moment, find_cut, count=count)
        # A cut within the rounding noise is left to the full decomposition, which knows each value.
        if found is not None:
            noise = resolution * min(float(found[0][0]), rounded_energy)
            if float(found[0][found[1].shape[1] - 1]) > noise:
                return Spectrum(values=found[0], vectors=found[1], tokens=tokens, dead=dead)
    work = moment.to(working_dtype(moment.shape[0], moment.device.type))
    values, vectors = torch.linalg.eigh(work)
    values = values.flip(0).to(device="cpu", dtype=torch.float64)
    largest = float(values[0].clamp_min(0))
    finest = torch.finfo(torch.float64).eps * largest
    noise = max(resolution * min(largest, rounded_energy), torch.finfo(work.dtype).eps * largest)
    floor = noise if noise > 4 * finest else 0.0
    values = torch.where(values > noise, values, torch.full_like(values, floor))
    return Spectrum(values=values, vectors=vectors.flip(1), tokens=tokens, dead=dead)


def dead_channels(moment: Tensor) -> int:
    """Count the channels without input worth the name: at most `NEARLY_DEAD` of the median channel's energy.

    An RMSNorm weight near 0 silences its channel for every prompt. Only channels of the layer's own coordinates count:
    the empty directions of a rank-deficient moment are real freedom.

    Returns:
        Their number. As many of the last eigenvalues are no larger than the largest energy of these channels (Cauchy's
        interlacing).
    """
    energies = moment.diagonal()
    used = energies[energies > 0]
    return int((energies <= NEARLY_DEAD * used.median()).sum()) if len(used) else len(energies)


def build_basis(
    spectrum: Spectrum,
    choice: RankChoice,
    *,
    subspace: Subspace = "null",
    seed: int = 0,
    directions: Tensor | None = None,
) -> Basis:
    """Keep the thinner of the protected and the null directions.

    Args:
        spectrum: Eigenpairs, leading first.
        choice: How many directions are protected.
        subspace: ``null`` updates avoid the leading directions; ``random`` as many random ones; ``protected`` they
            are confined to the leading ones (a control, the opposite of the method), and with ``to_learn`` too, the
            eigenpairs then being those of what is to be learnt; ``weights`` they avoid as many of the weights' own
            leading directions.
        seed: Seed of the random subspace.
        directions: Those, all of them, for ``weights``; see `weight_directions`.

    Returns:
        The basis, in float32 (float32 rounding of orthonormal vectors leaks about 1e-7, bfloat16 2e-3).

    Raises:
        ValueError: If ``weights`` is asked for and there are no directions of them.
    """
    width, k = spectrum.values.numel(), choice.protected
    vectors = spectrum.vectors
    if subspace == "random":
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        vectors = vectors.to(spectrum.vectors.device)
    if subspace == "weights":
        if directions is None:
            raise ValueError("subspace='weights' needs the weights: it can only be had where a model is calibrated.")
        vectors = directions.to(spectrum.vectors.device)
    leading, trailing = vectors[:, :k], vectors[:, k:]
    if subspace in ("protected", "to_learn"):
        # Updates stay inside the leading directions: what they avoid is the rest.
        leading, trailing = trailing, leading
        choice = replace(choice, protected=width - k, null_share=k / width)
    complement = trailing.shape[1] < leading.shape[1] and vectors.shape[1] == width
    kept = (trailing if complement else leading).to(torch.float32).contiguous()
    return Basis(
        vectors=kept,
        complement=complement,
        values=spectrum.values,
        choice=choice,
        tokens=spectrum.tokens,
        subspace=subspace,
        outside=spectrum.outside,
    )


def build_soft_basis(spectrum: Spectrum, softness: float) -> Basis:
    """Whiten instead of cutting: S = (I + C/m)^(-1/2), m = ``softness`` times the mean eigenvalue.

    A unit step in coordinates A~ with A = A~ S moves general outputs by at most m in every direction. Directions with
    eigenvalues below 0.1 m are left alone (they obey the bound as they are), so that only a thin matrix is stored.

    Args:
        spectrum: Eigenpairs, leading first.
        softness: The bound m in units of the mean eigenvalue; larger is freer.

    Returns:
        The basis of S = I - Z diag(w) Z^T with w_i = 1 - (1 + l_i/m)^(-1/2).

    Raises:
        ValueError: If ``softness`` is not positive.
    """
    if not softness > 0:
        raise ValueError(f"`softness` must be positive (a share of the mean eigenvalue), got {softness}.")
    values = spectrum.values
    m = softness * float(values.mean())
    if m <= 0:
        damped, weights = 0, values.new_zeros(0)
    else:
        damped = int((values > SOFT_TRUNCATION * m).sum())
        weights = 1 - (1 + values[:damped] / m).rsqrt()
    scaled = values.clone()
    scaled[:damped] *= (1 - weights).square()
    left = float(scaled.sum() / values.sum().clamp_min(torch.finfo(torch.float64).tiny))
    width = values.numel()
    choice = RankChoice(
        protected=damped,
        energy_left=left,
        null_share=(width - damped) / width,
        gain=left,
        reason=f"soft, m = {softness:g} of the mean eigenvalue",
    )
    vectors = spectrum.vectors[:, :damped].to(torch.float32).contiguous()
    return Basis(
        vectors=vectors,
        weights=weights.to(device=vectors.device, dtype=torch.float32),
        values=values,
        choice=choice,
        tokens=spectrum.tokens,
        outside=spectrum.outside,
    )
