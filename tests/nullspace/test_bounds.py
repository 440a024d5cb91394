"""A certificate's bound holds for every update inside the null space, found by attacking it with the true moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nspo_lightning.nullspace import (
    BasisSettings,
    Calibration,
    ForwardCall,
    apply,
    calibrate_modules,
    certify,
    load_calibration,
    save_calibration,
)

WIDTH, OUT = 48, 12
SLACK = 1 + 1e-3  # bases and layers are float32, inputs up to 1e4


def spectrum(kind: str, width: int = WIDTH) -> Tensor:
    index = torch.arange(width, dtype=torch.float64)
    values = {
        "steep": 10.0 ** (-6 * index / width),
        "flat": 1 / (1 + index / 20),
        "gap": torch.where(index < 12, 1.0, 1e-5),
        "cluster": torch.where(index < 12, 1.0 + index * 1e-9, 0.3),
    }
    return values[kind]


def rows(kind: str, count: int, seed: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scaled = torch.randn(count, width, generator=generator, dtype=torch.float64) * spectrum(kind, width).sqrt()
    return scaled @ turn


def massive(count: int, seed: int, factor: float, width: int = WIDTH) -> Tensor:
    """One row in eight has one channel a thousand to ten thousand times larger, as large models have."""
    x = rows("steep", count, seed, width)
    x[::8, 3] = factor
    return x


def calibrated(domains: dict[str, Tensor], layer: nn.Linear, **options: Any) -> Calibration:
    budget = options.pop("memory_budget_gb", None)

    def calls() -> Iterator[ForwardCall]:
        for name, x in domains.items():
            for part in x.float().split(64):
                yield ForwardCall(args=(part,), domains=[name] * len(part))

    settings = BasisSettings(**options)
    return calibrate_modules({"layer": layer}, layer, calls, settings, memory_budget_gb=budget)


def worst(calibration: Calibration, domains: dict[str, Tensor], layer: nn.Linear) -> float:
    """Return the largest true / bound over updates inside the null space and over texts: each domain, and all of them.

    The directions that maximise v^T C v / |v|^2 inside the null space of each text, mixed at random.
    """
    basis = calibration.basis_of("layer")
    generator = torch.Generator().manual_seed(0)
    texts = {**domains, "all": torch.cat(list(domains.values()))}
    eye = torch.eye(basis.width, dtype=torch.float64)
    inside = apply(basis, eye)
    candidates = []
    for x in texts.values():
        x = x.float().double()
        moment = inside @ (x.T @ x / len(x)) @ inside.T
        top = torch.linalg.eigh((moment + moment.T) / 2).eigenvectors.T.flip(0) @ inside
        candidates += [top[:1], top[:3], top[-3:], top]
    candidates += [torch.randn(OUT, basis.width, generator=generator, dtype=torch.float64) @ inside for _ in range(4)]
    found = 0.0
    for directions in candidates:
        mixing = torch.randn(OUT, len(directions), generator=generator, dtype=torch.float64)
        update = mixing @ directions
        update = update / torch.linalg.vector_norm(update).clamp_min(1e-300)
        if basis.form == "hard":
            update = apply(basis, update)
        bound = certify("layer", basis, update, output_energy=calibration.output_energy["layer"]).output_change
        for x in texts.values():
            x = x.float().double()
            change = (x @ update.T).square().sum(1).mean()
            true = float((change / layer(x.float()).double().square().sum(1).mean()).sqrt())
            if true > 1e-12:
                found = max(found, true / max(bound, 1e-300))
    return found


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, OUT, bias=False).requires_grad_(False)


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["steep", "flat", "gap", "cluster"])
def test_the_bound_holds_over_spectra(kind: str, form: Any, layer: nn.Linear) -> None:
    domains = {"general": rows(kind, 600, 1)}
    assert worst(calibrated(domains, layer, form=form), domains, layer) <= SLACK


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("number", [2, 5])
def test_the_bound_holds_in_every_domain_and_in_their_mixture(number: int, form: Any, layer: nn.Linear) -> None:
    domains = {f"d{i}": rows("flat", 100 * (i + 1), i) * 3.0**-i for i in range(number)}
    assert worst(calibrated(domains, layer, form=form), domains, layer) <= SLACK
    weights = {name: float(i + 1) for i, name in enumerate(domains)}
    assert worst(calibrated(domains, layer, form=form, domain_weights=weights), domains, layer) <= SLACK


@pytest.mark.parametrize("factor", [1e3, 1e4])
def test_massive_activations_do_not_hide_the_others(factor: float) -> None:
    width = 320  # wide enough for products in float32
    torch.manual_seed(0)
    wide = nn.Linear(width, OUT, bias=False).requires_grad_(False)
    domains = {"general": massive(2000, 1, factor, width)}
    for options in ({}, {"criterion": "auto", "max_output_change": 1e-4}, {"criterion": "energy", "threshold": 1e-9}):
        calibration = calibrated(domains, wide, **options)
        assert worst(calibration, domains, wide) <= SLACK
        exact = torch.linalg.svdvals(domains["general"].float().double()).square() / 2000
        k = calibration.basis_of("layer").protected
        left = float(exact[k:].sum() / exact.sum())
        assert calibration.basis_of("layer").choice.energy_left >= left * (1 - 1e-3)
    limited = calibrated(domains, wide, criterion="auto", max_output_change=1e-4)
    k = limited.basis_of("layer").protected
    assert float((exact[k:].sum() / exact.sum()).sqrt()) <= 1e-4 * SLACK


def test_the_bound_holds_for_a_sketch() -> None:
    width = 600
    torch.manual_seed(0)
    wide = nn.Linear(width, OUT, bias=False).requires_grad_(False)
    for kind in ("steep", "flat"):
        domains = {"general": rows(kind, 1500, 2, width)}
        sketched = calibrated(domains, wide, criterion="energy", threshold=0.3, memory_budget_gb=0.0025)
        basis = sketched.basis_of("layer")
        assert basis.vectors.shape[1] < width
        assert worst(sketched, domains, wide) <= SLACK


@pytest.mark.parametrize("damage", ["zero", "not orthonormal", "not finite", "scaled"])
def test_a_basis_file_that_is_no_basis_is_refused(tmp_path: Any, damage: str, layer: nn.Linear) -> None:
    calibration = calibrated({"general": rows("gap", 400, 1)}, layer, criterion="rank", threshold=12)
    vectors = calibration.bases["layer"].vectors
    match damage:
        case "zero":
            vectors.zero_()
        case "not orthonormal":
            vectors[:, 0] = vectors[:, 1]
        case "not finite":
            vectors[0, 0] = float("nan")
        case "scaled":
            vectors[:, 0] *= 1.5
    path = save_calibration(calibration, tmp_path / "basis.safetensors")
    with pytest.raises(ValueError, match="orthonormal|finite"):
        load_calibration(path)
