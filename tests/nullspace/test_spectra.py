"""Spectra as they should not be, under both criteria that choose by themselves: what stays free is of use, and stable.

The last test has an independent reference for `contrast`: scipy's generalised eigenvalue problem, and sums over steps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from embedded_linear import EmbeddedLinear

from nspo_lightning.nullspace import TO_LEARN, BasisSettings, ForwardCall, calibrate_modules, choose_rank
from nspo_lightning.nullspace.basis_builder import BasisBuilder, directions_for
from nspo_lightning.nullspace.contrast import NEGLIGIBLE_SHARE, REGULARISATION, candidates, choose_free
from nspo_lightning.nullspace.projection import apply

WIDTH = 48
CRITERIA = ("auto", "contrast")


def rotated(values, seed=0):
    """Return a moment with these eigenvalues in a random orthonormal basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    random = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(random).Q
    return (q * values) @ q.T


def with_dead(moment, dead):
    """Return a moment with channels that carry nothing."""
    width = len(moment) + dead
    found = torch.zeros(width, width, dtype=moment.dtype)
    found[: len(moment), : len(moment)] = moment
    return found


def with_weak(moment, energies):
    """Return a moment with further channels of these energies."""
    found = with_dead(moment, len(energies))
    found[len(moment) :, len(moment) :] = torch.as_tensor(energies, dtype=moment.dtype).diag()
    return found


def spectra():
    """Yield (name, eigenvalues, dead channels)."""
    slope = torch.logspace(0, -3, WIDTH, dtype=torch.float64)
    yield "ordinary", slope, 0
    yield "one dead channel", torch.linspace(1.2, 0.8, WIDTH, dtype=torch.float64), 1
    yield "dead channels", slope, 5
    yield "ties", torch.tensor([8.0] * 12 + [1.0] * 24 + [0.01] * 12), 0
    yield "rank-deficient", torch.cat([slope[:20], torch.zeros(WIDTH - 20)]), 0
    yield "flat", torch.ones(WIDTH), 0
    yield "massive leaders", torch.cat([torch.tensor([1e8, 1e6, 1e5]), slope[3:]]), 0


SPECTRA = [pytest.param(values, dead, id=name) for name, values, dead in spectra()]


def moments(values, dead):
    """Return C with a spectrum, and S: four directions, half in its tail, as the starts of answers give them."""
    rows = torch.randn(4, len(values), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return with_dead(rotated(values), dead), with_dead(rows.T @ rows / 4, dead)


def basis_of(criterion, c, s, **options):
    settings = BasisSettings(criterion=criterion, **options)
    builder = BasisBuilder(settings)
    to_learn = s if criterion == "contrast" else None
    builder.add("x", directions_for(settings, c, to_learn, tokens=10_000, resolution=1e-16))
    return builder.finish()["x"]


def free_part(basis, width):
    return apply(basis, torch.eye(width)).double()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("values", "dead"), SPECTRA)
def test_something_can_be_learnt_in_what_stays_free(values, dead, criterion):
    c, s = moments(values, dead)
    basis = basis_of(criterion, c, s)
    free = free_part(basis, len(c))
    assert 1 <= basis.protected < len(c)
    gain = float((free @ s @ free).trace() / s.trace())
    assert gain > 5e-3
    # Confined there, a step of a given gain moves general outputs less than a free one (a flat spectrum: no more).
    learnt = torch.linalg.eigh(s)
    rows = (learnt.eigenvectors * learnt.eigenvalues.clamp_min(0).sqrt()).T
    steps = rows @ free
    cost, plain = (float(((x @ c) * x).sum()) for x in (steps, rows))
    reached = float((steps * rows).sum() / (rows**2).sum())
    assert cost / reached**2 < 1.5 * plain


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dead", [1, 6])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_dead_channels_never_count_as_freedom(criterion, dead, share):
    """As many directions with input are free as without them. A dead one is the first that costs nothing."""
    for values in (torch.linspace(1.2, 0.8, WIDTH), torch.logspace(0, -3, WIDTH), torch.logspace(2, -6, WIDTH)):
        alive, learnt = moments(values, 0)
        c, s = with_dead(alive, dead), with_dead(learnt, dead)
        basis, without = basis_of(criterion, c, s, min_null_share=share), basis_of(criterion, alive, learnt)
        free = free_part(basis, len(c))
        live = torch.linalg.matrix_rank(free[:WIDTH, :WIDTH], tol=1e-3)
        if share:
            assert basis.null_dims >= share * len(c)
        if criterion == "contrast":
            assert float(free[WIDTH:].abs().max()) < 1e-5
            assert live == basis.null_dims
        if not share:
            assert live == WIDTH - without.protected


def test_a_dead_channel_does_not_freeze_a_layer():
    """A gate of a real model: 575 of 576 directions were protected, and the free one carries no input."""
    values = torch.cat([torch.logspace(0, -1, 575), torch.zeros(1)])
    assert choose_rank(values).protected == 575
    choice = choose_rank(values, dead=1)
    assert choice.protected < 500
    assert choice.gain < 1
    assert choose_rank(torch.tensor([1.0, 0.0, 0.0]), dead=2).protected == 1  # the only live one


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("energies", [(4e-5,), (9e-3, 1e-3, 1e-9, 0.0)])
@pytest.mark.parametrize("leader", [1.0, 1e5])
def test_nearly_dead_channels_are_no_freedom_either(criterion, energies, leader):
    """RMSNorm weights near 0, as a real model has them; `energies`: of the median channel's."""
    values = torch.linspace(1.2, 0.8, WIDTH, dtype=torch.float64)
    alive, learnt = moments(values, 0)
    alive[0, 0] = leader  # as massive activations lie in one channel
    median = float(alive.diagonal().median())
    c, s = with_weak(alive, [median * energy for energy in energies]), with_dead(learnt, len(energies))
    free = free_part(basis_of(criterion, c, s), len(c))[:WIDTH, :WIDTH]
    without = free_part(basis_of(criterion, alive, learnt), WIDTH)
    assert torch.linalg.matrix_rank(free, tol=1e-3) == torch.linalg.matrix_rank(without, tol=1e-3) > 1


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("values", "dead"), SPECTRA)
def test_rounding_decides_nothing(values, dead, criterion):
    """Of moments that differ by rounding alone as much is protected, and where something can be chosen, the same."""
    c, s = moments(values, dead)
    first = basis_of(criterion, c, s)
    if criterion == "auto" and len(set(values.tolist())) > 1:  # a tie is cut nowhere but at its ends
        kept = sorted(values.tolist(), reverse=True)
        assert kept[first.protected - 1] > kept[first.protected] * (1 + 1e-9) or first.protected > len(values)
    for seed in range(3):
        noise = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noise = 1e-14 * c.abs().max() * (noise + noise.T) * (c != 0)
        other = basis_of(criterion, c + noise, s)
        assert other.protected == first.protected
        if not (criterion == "auto" and values.unique().numel() == 1):  # all alike: any direction will do
            torch.testing.assert_close(free_part(other, len(c)), free_part(first, len(c)), atol=2e-4, rtol=0)


def test_auto_on_massive_leaders_and_on_rows_that_are_few():
    leaders, few = (next(v for name, v, _ in spectra() if name == of) for of in ("massive leaders", "rank-deficient"))
    massive = choose_rank(leaders)
    assert 3 <= massive.protected < WIDTH // 2
    assert choose_rank(few).protected == 20


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_order_of_batches_decides_nothing(criterion):
    torch.manual_seed(0)
    model = EmbeddedLinear(23, 12)
    generator = torch.Generator().manual_seed(1)
    calls: list[ForwardCall] = []
    backwards: list[ForwardCall] = []
    for domains in (["maths", "code", TO_LEARN], ["code", "code"], [TO_LEARN, "maths"], ["maths"]):
        ids = torch.randint(0, 23, (len(domains), 9), generator=generator)
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 4:8] = True
        calls.append(ForwardCall(kwargs={"input_ids": ids}, mask=torch.ones_like(ids), domains=domains, starts=starts))
        kwargs = {"input_ids": ids.flip(0)}  # the same texts, the last one first
        backwards.insert(0, replace(calls[-1], kwargs=kwargs, domains=domains[::-1], starts=starts.flip(0)))
    found = [
        calibrate_modules({"linear": model.linear}, model, lambda: batches, BasisSettings(criterion=criterion)).bases  # noqa: B023
        for batches in (calls, backwards, calls[2:] + calls[:2])
    ]
    for other in found[1:]:
        assert other["linear"].protected == found[0]["linear"].protected
        torch.testing.assert_close(free_part(other["linear"], 12), free_part(found[0]["linear"], 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("values", "dead"), SPECTRA)
def test_contrast_is_what_scipy_finds(values, dead):
    """Directions: the generalised eigenvalue problem. Harm: sums over steps b x', x a row of what is learnt from."""
    c, s = moments(values, dead)
    found = candidates(c, s, tokens=1)
    c, s = c.numpy(), s.numpy()
    width = len(c)
    gains, vectors = scipy.linalg.eigh(s, c + REGULARISATION * np.trace(c) / width * np.eye(width))
    assert found.most == np.linalg.matrix_rank(s) == 4
    for m in range(1, 5):
        wanted = scipy.linalg.orth(vectors[:, ::-1][:, :m])
        angles = scipy.linalg.subspace_angles(wanted, found.directions[:, :m].double().numpy())
        assert angles.max() < 1e-3
        size, rows = np.linalg.eigh(s)
        harms: list[float] = []
        for space in (wanted @ wanted.T, np.eye(width)):
            change = gain = 0.0
            for weight, x in zip(size.clip(0), rows.T, strict=True):
                step = space @ x
                change += weight * step @ c @ step
                gain += weight * step @ x
            change, gain = change / np.trace(s) / np.trace(c), gain / np.trace(s)
            harms.append((change + (NEGLIGIBLE_SHARE * gain if len(harms) == 0 else 0)) / gain**2)
        assert found.harm(m) == pytest.approx(harms[0] / harms[1], rel=1e-3)
    assert (np.diff(gains) >= 0).all()
    # The multiplier: no other number of free directions does less harm in a single input.
    free = width - choose_free({"x": found})["x"].protected
    assert found.harm(free) == pytest.approx(min(found.harm(m) for m in range(1, 5)), rel=1e-6)
