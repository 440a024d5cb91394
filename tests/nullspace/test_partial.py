"""The leading part of a spectrum: as exact as a full float64 decomposition, or not used at all."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning.nullspace import BasisSettings, basis, choose_rank, partial
from nspo_lightning.nullspace.basis_builder import bases_from_spectra, decompose_for
from nspo_lightning.nullspace.criteria import Criterion
from nspo_lightning.nullspace.partial import leading_eigenpairs, with_tail

WIDTH = 256
SUBSPACE = 1e-6  # sine of the largest angle: what the project promises; the residual bound asks for a tenth of it
ENERGY = 1e-12  # energies are sums of float64 numbers

GAP = torch.cat([torch.logspace(2, 0, 60), torch.logspace(-4, -6, WIDTH - 60)]).double()
STEEP = torch.logspace(2, -14, WIDTH, dtype=torch.float64)  # no gap, but each value is far below the one before
MASSIVE = torch.cat([torch.tensor([50.0, 10.0, 5.0]), 0.01 / torch.arange(1, WIDTH - 2)]).double()
POWER = torch.arange(1, WIDTH + 1).double().pow(-1.0)  # no gap anywhere


def moment_of(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    moment = vectors @ torch.diag(values) @ vectors.T
    return (moment + moment.T) / 2


def cut(criterion: Criterion, threshold: float):
    return lambda values: choose_rank(values, criterion, threshold).protected


@pytest.mark.parametrize(
    ("values", "criterion", "threshold", "protected"),
    [
        (GAP, "rank", 60, 60),
        (GAP, "energy", 1e-4, 60),
        (GAP, "relative", 1e-4, 60),
        (GAP, "absolute", 0.5, 60),
        (GAP, "bound", 0.01, 60),
        (STEEP, "energy", 1e-3, 48),
        (MASSIVE, "rank", 3, 3),
        (MASSIVE, "relative", 5e-4, 3),
        (MASSIVE, "energy", 1e-3, 3),
    ],
)
def test_it_equals_a_dense_float64_decomposition(values, criterion, threshold, protected):
    moment = moment_of(values)
    exact_values, exact = torch.linalg.eigh(moment)
    exact_values, exact = exact_values.flip(0), exact.flip(1)
    find_cut = cut(criterion, threshold)
    count = protected if criterion == "rank" else None
    found = leading_eigenpairs(moment, find_cut, count=count)
    assert found is not None, "the full decomposition was needed"
    k = find_cut(exact_values)
    assert k == protected
    assert found[1].shape == (WIDTH, k)
    outside = exact[:, :k] - found[1] @ (found[1].T @ exact[:, :k])
    assert float(torch.linalg.matrix_norm(outside, 2)) < SUBSPACE
    assert (found[1].T @ found[1] - torch.eye(k)).abs().max() < 1e-12
    assert torch.allclose(found[0][:k], exact_values[:k], rtol=1e-9)
    assert float(exact_values[k]) * (1 - 1e-9) <= float(found[0][k]) < 1.1 * float(exact_values[k])
    ours, dense = choose_rank(found[0], criterion, threshold), choose_rank(exact_values, criterion, threshold)
    assert ours.energy_left == pytest.approx(dense.energy_left, rel=1e-9, abs=ENERGY)
    assert torch.equal(found[0], found[0].sort(descending=True).values)
    assert float(found[0].sum()) == pytest.approx(float(values.sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "criterion", "threshold"),
    [
        (POWER, "energy", 0.3),  # the cut lies in the block, but neighbours are too close to be told apart quickly
        (POWER, "energy", 1e-3),  # the cut lies outside every block
        (GAP, "rank", 200),  # more directions than a block may have
        (torch.ones(WIDTH, dtype=torch.float64), "rank", 10),  # the cut falls into a cluster
        (torch.cat([torch.ones(20), torch.full((WIDTH - 20,), 1e-8)]).double(), "rank", 10),
        (torch.zeros(WIDTH, dtype=torch.float64), "rank", 10),
    ],
)
def test_where_it_cannot_be_exact_it_gives_up(values, criterion, threshold):
    count = int(threshold) if criterion == "rank" else None
    assert leading_eigenpairs(moment_of(values), cut(criterion, threshold), count=count) is None


def test_fewer_tokens_than_the_width_give_the_directions_they_span():
    rows = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = leading_eigenpairs(rows.T @ rows / 30, cut("energy", 1e-6))
    assert found is not None
    outside = rows - (rows @ found[1]) @ found[1].T
    assert float(outside.norm() / rows.norm()) < SUBSPACE


def test_residuals_decide_and_not_the_prediction(monkeypatch):
    """With one product too few the residuals are too large, and nothing is returned."""
    values = torch.cat([torch.linspace(2, 1, 60), torch.full((WIDTH - 60,), 0.02)]).double()
    assert leading_eigenpairs(moment_of(values), cut("rank", 60), count=60) is not None
    monkeypatch.setattr(partial, "_probe", lambda single, *_: torch.linalg.qr(torch.randn(WIDTH, 80)).Q)
    monkeypatch.setattr(partial, "_FINAL_ROUNDS", 1)
    assert leading_eigenpairs(moment_of(values), cut("rank", 60), count=60) is None


@pytest.fixture
def narrow(monkeypatch):
    """Let the partial decomposition run at a width that a test can afford."""
    monkeypatch.setattr(basis, "LEAST_WIDTH", 64)


@pytest.mark.parametrize(
    ("settings", "partly"),
    [
        (BasisSettings(criterion="energy", threshold=1e-4), True),
        (BasisSettings(criterion="rank", threshold=60), True),
        (BasisSettings(criterion="rank", threshold=60, subspace="random"), True),
        (BasisSettings(criterion="null_share", threshold=0.75), False),  # 64 directions: in the flat part
        (BasisSettings(criterion="auto"), False),  # looks at all eigenvalues
        (BasisSettings(criterion="rank", threshold=60, subspace="protected"), False),  # needs the other directions
        (BasisSettings(form="soft"), False),
        (BasisSettings(criterion="rank", threshold=200), False),
    ],
)
def test_bases_are_the_same_either_way(monkeypatch, narrow, settings, partly):
    moment = moment_of(GAP)
    quick = decompose_for(settings, moment, tokens=1000, resolution=1e-15)
    assert (quick.vectors.shape[1] < WIDTH) is partly
    monkeypatch.setattr(basis, "LEAST_WIDTH", 10**9)
    full = decompose_for(settings, moment, tokens=1000, resolution=1e-15)
    assert full.vectors.shape[1] == WIDTH
    ours, dense = (bases_from_spectra({"": spectrum}, settings)[""] for spectrum in (quick, full))
    assert (ours.protected, ours.complement, ours.null_dims) == (dense.protected, dense.complement, dense.null_dims)
    assert ours.choice.reason == dense.choice.reason
    assert ours.choice.energy_left == pytest.approx(dense.choice.energy_left, rel=1e-9)
    a, b = ours.vectors.double(), dense.vectors.double()
    assert float(torch.linalg.matrix_norm(a - b @ (b.T @ a), 2)) < SUBSPACE


def test_a_threshold_below_rounding_needs_each_small_eigenvalue(narrow):
    strict = BasisSettings(criterion="energy", threshold=0.0)
    assert decompose_for(strict, moment_of(GAP), tokens=9, resolution=1e-15).vectors.shape[1] == WIDTH


def test_a_cut_within_rounding_noise_is_left_to_the_full_decomposition(narrow):
    settings = BasisSettings(criterion="rank", threshold=60)
    assert decompose_for(settings, moment_of(GAP), tokens=9, resolution=1e-1).vectors.shape[1] == WIDTH


def test_narrow_moments_and_float32_ones_are_decomposed_in_full(narrow):
    settings = BasisSettings(criterion="rank", threshold=60)
    single = decompose_for(settings, moment_of(GAP).float(), tokens=9, resolution=1e-15)
    assert single.vectors.shape[1] == WIDTH
    small = decompose_for(BasisSettings(criterion="rank", threshold=5), moment_of(GAP[:63]), tokens=9, resolution=1e-15)
    assert small.vectors.shape[1] == 63


def test_a_tail_holds_the_energy_that_is_left_and_never_rises():
    values = with_tail(torch.tensor([5.0, 2.0, 0.1]), 13.1, 10)  # 0.1 lies below the mean of what follows it
    assert values.tolist() == pytest.approx([5.0, 2.0] + [6.1 / 8] * 8)
    assert float(with_tail(torch.tensor([3.0, 1.0]), 4.0, 2).sum()) == 4.0
