"""The projection as algebra, packed and alone, and why both projections of a step are needed."""

from __future__ import annotations

import pytest
import torch

from nspo_lightning.nullspace import RankChoice, apply, build_basis, build_soft_basis, choose_rank, decompose
from nspo_lightning.nullspace.basis import Basis, Spectrum
from nspo_lightning.nullspace.packing import build_packs
from nspo_lightning.nullspace.projection import component, project_start, protected_component

FLOAT32 = 1e-6  # a float32 basis of a few hundred directions


def spectrum(width: int, tokens: int, seed: int = 0) -> tuple[Spectrum, torch.Tensor]:
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return decompose(inputs.T @ inputs / tokens, tokens=tokens), inputs


def hard(width: int, protected: int, seed: int = 0) -> Basis:
    found, _ = spectrum(width, 4 * width, seed)
    return build_basis(found, choose_rank(found.values, "rank", protected))


@pytest.mark.parametrize("protected", [1, 10, 16, 17, 31])
def test_hard_projection_is_a_symmetric_idempotent_that_removes_the_leading_directions(protected):
    found, _ = spectrum(32, 200)
    basis = build_basis(found, choose_rank(found.values, "rank", protected))
    assert basis.complement == (protected > 16)  # the thinner of U and V is stored
    assert basis.vectors.shape[1] == min(protected, 32 - protected)
    projector = apply(basis, torch.eye(32, dtype=torch.float64))
    dense = torch.eye(32, dtype=torch.float64) - found.vectors[:, :protected] @ found.vectors[:, :protected].T
    assert (projector - dense).abs().max() < FLOAT32
    assert (projector @ projector - projector).abs().max() < FLOAT32
    assert (projector - projector.T).abs().max() < FLOAT32
    assert (projector @ found.vectors[:, :protected]).abs().max() < FLOAT32


def test_update_through_the_projection_does_not_move_outputs_on_calibration_inputs():
    found, inputs = spectrum(32, 12)
    basis = build_basis(found, choose_rank(found.values, "energy", 1e-14))
    update = apply(basis, torch.randn(7, 32))
    assert (inputs @ update.double().T).abs().max() < 1e-5
    assert basis.protected == 12


def test_both_storages_agree_on_what_is_protected():
    found, _ = spectrum(32, 200)
    matrix = torch.randn(5, 32, dtype=torch.float64)
    for protected in (5, 27):
        basis = build_basis(found, choose_rank(found.values, "rank", protected))
        leading = found.vectors[:, :protected]
        assert (protected_component(basis, matrix) - matrix @ leading @ leading.T).abs().max() < FLOAT32


def test_start_keeps_the_norm_and_survives_an_adapter_that_lies_in_the_protected_space():
    basis = hard(32, 10)
    adapter = torch.randn(4, 32)
    started = project_start(basis, adapter)
    assert torch.linalg.vector_norm(started) == pytest.approx(float(torch.linalg.vector_norm(adapter)), rel=1e-6)
    assert torch.linalg.vector_norm(component(basis, started)) / torch.linalg.vector_norm(started) < FLOAT32
    assert torch.equal(project_start(basis, torch.zeros(4, 32)), torch.zeros(4, 32))


def test_soft_form_is_the_whitening_it_claims_to_be():
    found, _ = spectrum(24, 100)
    basis = build_soft_basis(found, 0.01)
    m = 0.01 * float(found.values.mean())
    dense = found.vectors @ torch.diag((1 + found.values / m).rsqrt()) @ found.vectors.T
    assert (apply(basis, torch.eye(24, dtype=torch.float64)) - dense).abs().max() < FLOAT32
    # A unit step moves outputs by at most m in every direction.
    moment = found.vectors @ torch.diag(found.values) @ found.vectors.T
    operator = apply(basis, torch.eye(24, dtype=torch.float64))
    assert torch.linalg.eigvalsh(operator @ moment @ operator)[-1] <= m * (1 + 1e-6)


def test_soft_form_leaves_negligible_directions_alone_and_keeps_its_bound():
    values = torch.logspace(3, -6, 40, dtype=torch.float64)
    found = Spectrum(values=values, vectors=torch.eye(40, dtype=torch.float64), tokens=1000)
    basis = build_soft_basis(found, 0.01)
    m = 0.01 * float(values.mean())
    assert basis.vectors.shape[1] < 40
    operator = apply(basis, torch.eye(40, dtype=torch.float64))
    assert (operator.square().sum(0) * values).max() <= m * (1 + 1e-6)


@pytest.mark.parametrize("subspace", ["random", "protected"])
def test_control_subspaces_have_the_dimension_they_are_compared_at(subspace):
    found, _ = spectrum(32, 200)
    basis = build_basis(found, choose_rank(found.values, "rank", 10), subspace=subspace, seed=3)
    rank = int(torch.linalg.matrix_rank(apply(basis, torch.eye(32, dtype=torch.float64)), rtol=1e-3))
    assert rank == (22 if subspace == "random" else 10)
    assert basis.null_dims == rank
    again = build_basis(found, choose_rank(found.values, "rank", 10), subspace=subspace, seed=3)
    assert torch.equal(again.vectors, basis.vectors)


@pytest.mark.parametrize("kind", ["protected", "null", "soft", "mixed widths"])
def test_packed_projections_equal_single_ones(kind):
    bases, matrices, keys = [], [], []
    for index in range(4):
        width = 32 if kind != "mixed widths" or index % 2 else 48
        found, _ = spectrum(width, 200, seed=index)
        protected = 20 + index if kind == "null" else 5 + index
        basis = (
            build_soft_basis(found, 0.1)
            if kind == "soft"
            else build_basis(found, choose_rank(found.values, "rank", protected))
        )
        for rows in (4, 4, 3)[: 1 + index % 3]:  # several matrices share this basis
            bases.append(basis)
            matrices.append(torch.randn(rows, width))
            keys.append("cpu")
    packs = build_packs([m.shape[0] for m in matrices], bases, keys)
    assert len(packs) < len(matrices)
    seen = []
    for pack in packs:
        for slot, part in zip(pack.slots, pack.split(pack.apply(pack.gather(matrices))), strict=True):
            seen.append(slot.index)
            assert (part - apply(bases[slot.index], matrices[slot.index])).abs().max() < FLOAT32
    assert sorted(seen) == list(range(len(matrices)))


def test_empty_shards_are_left_out_of_packs():
    basis = hard(16, 4)
    packs = build_packs([0, 3], [basis, basis], ["cpu", "cpu"])
    assert [slot.index for pack in packs for slot in pack.slots] == [1]


def test_displacement_only_can_climb_and_both_projections_never_do():
    """Of a step along -P D g (the released trainer's form) and one along -P D P g, only the second always descends."""
    generator = torch.Generator().manual_seed(0)
    climbs = {"P D g": 0, "P D P g": 0}
    for _ in range(2000):
        basis, _ = torch.linalg.qr(torch.randn(16, 12, generator=generator, dtype=torch.float64))
        projector = torch.eye(16, dtype=torch.float64) - basis @ basis.T
        gradient = torch.randn(16, generator=generator, dtype=torch.float64)
        scale = torch.rand(16, generator=generator, dtype=torch.float64).pow(4) + 1e-4  # Adam's 1 / sqrt(v)
        climbs["P D g"] += int(gradient @ projector @ (scale * gradient) < 0)
        climbs["P D P g"] += int(gradient @ projector @ (scale * (projector @ gradient)) < -1e-15)
    assert climbs["P D P g"] == 0
    assert climbs["P D g"] > 10


def test_a_moment_that_is_not_finite_or_not_square_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        decompose(torch.full((2, 2), float("nan")), tokens=1)
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        decompose(torch.zeros(2, 3), tokens=1)
    with pytest.raises(ValueError, match="`softness` must be positive"):
        build_soft_basis(Spectrum(values=torch.ones(2), vectors=torch.eye(2), tokens=1), 0.0)


def test_zero_inputs_leave_every_direction_free():
    found = decompose(torch.zeros(4, 4), tokens=3)
    basis = build_basis(found, choose_rank(found.values))
    matrix = torch.randn(2, 4)
    assert basis.null_dims == 4
    assert torch.equal(apply(basis, matrix), matrix)
    assert torch.equal(apply(build_soft_basis(found, 0.01), matrix), matrix)


def test_bases_are_kept_in_float32():
    found, _ = spectrum(16, 50)
    choice = RankChoice(protected=3, energy_left=0.1, null_share=0.8, gain=0.1, reason="")
    assert build_basis(found, choice).vectors.dtype == torch.float32
