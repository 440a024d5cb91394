"""Calibration as a whole: sharing, masks, domains, budget, sketch, ranks, files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nspo_lightning.nullspace import (
    BasisSettings,
    ForwardCall,
    NoNullDirections,
    calibrate_modules,
    domain_report,
    load_calibration,
    principal_cosines,
    save_calibration,
    table_rows,
)
from nspo_lightning.nullspace.budget import peak_bytes
from nspo_lightning.nullspace.collect import InputCollector
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.store import check_fingerprint

FLOAT32 = 2e-6


class Block(nn.Module):
    """q and k read one tensor, o another; `shared` is called twice with different inputs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, 5), nn.Linear(width, 5)
        self.o = nn.Linear(5, width)
        self.shared = nn.Linear(width, width)
        self.unused = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.o(torch.tanh(self.q(x) + self.k(x)))
        return self.shared(torch.tanh(self.shared(y)))


def modules_of(block: Block, names=("q", "k", "o", "shared")) -> dict[str, nn.Module]:
    return {name: getattr(block, name) for name in names}


def batches(count: int = 4, width: int = 12, **options) -> list[ForwardCall]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 7)
    mask[0, :3] = 0
    return [
        ForwardCall(args=(torch.randn(3, 7, width, generator=generator),), mask=mask, **options) for _ in range(count)
    ]


def counted(rows: torch.Tensor, call: ForwardCall) -> torch.Tensor:
    assert call.mask is not None
    return rows[call.mask.bool()]


def dense_moment(calls: list[ForwardCall], inputs=lambda x: x) -> torch.Tensor:
    rows = torch.cat([counted(inputs(c.args[0]), c) for c in calls]).double()
    return rows.T @ rows / rows.shape[0]


def calibrate(block, calls, settings=None, modules=None, **options):
    settings = settings or BasisSettings(criterion="rank", threshold=3)
    return calibrate_modules(modules or modules_of(block), block, lambda: iter(calls), settings, **options)


def test_moments_equal_the_dense_reference_and_inputs_are_shared():
    block, calls = Block(), batches()
    found = calibrate(block, calls, keep_moments=True)
    assert found.groups == {"q": ["q", "k"], "o": ["o"], "shared": ["shared"]}
    assert found.basis_of("k") is found.basis_of("q")
    reference = dense_moment(calls)
    assert (found.moments["q"]["general"] - reference).abs().max() < FLOAT32
    values = torch.linalg.eigvalsh(reference).flip(0)
    assert torch.allclose(found.bases["q"].values, values, rtol=1e-5)
    assert found.domain_tokens == {"general": 4 * (21 - 3)}


def test_a_module_called_twice_counts_both_inputs():
    block, calls = Block(), batches()
    found = calibrate(block, calls, keep_moments=True)
    with torch.no_grad():
        first = lambda x: block.o(torch.tanh(block.q(x) + block.k(x)))  # noqa: E731
        second = lambda x: torch.tanh(block.shared(first(x)))  # noqa: E731
        reference = (dense_moment(calls, first) + dense_moment(calls, second)) / 2
    assert (found.moments["shared"]["general"] - reference).abs().max() < FLOAT32


def test_inputs_shared_in_part_are_counted_apart():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x) + self.b(x) + self.b(x + 1)

    model = Partly()
    calls = [ForwardCall(args=(torch.randn(20, 6),)) for _ in range(3)]
    found = calibrate_modules(
        {"a": model.a, "b": model.b},
        model,
        lambda: calls,
        BasisSettings(criterion="rank", threshold=1),
        keep_moments=True,
    )
    assert set(found.groups) == {"a", "b"}
    rows = torch.cat([torch.cat([c.args[0], c.args[0] + 1]) for c in calls]).double()
    assert (found.moments["b"]["general"] - rows.T @ rows / len(rows)).abs().max() < FLOAT32
    plain = torch.cat([c.args[0] for c in calls]).double()
    assert (found.moments["a"]["general"] - plain.T @ plain / len(plain)).abs().max() < FLOAT32


def test_equal_but_different_tensors_are_not_shared():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + self.b(x.clone())

    model = Copies()
    calls = [ForwardCall(args=(torch.randn(9, 4),))]
    found = calibrate_modules(
        {"a": model.a, "b": model.b}, model, lambda: calls, BasisSettings(criterion="rank", threshold=1)
    )
    assert set(found.groups) == {"a", "b"}


def test_a_budget_makes_more_passes_with_the_same_result():
    block, calls = Block(), batches()
    runs: list[int] = []

    def forward(x):
        runs.append(1)
        return block(x)

    whole = calibrate(block, calls)
    need = peak_bytes([12], 1, "cpu") / 1e9  # one input at a time
    split = calibrate_modules(
        modules_of(block),
        forward,
        lambda: iter(calls),
        BasisSettings(criterion="rank", threshold=3),
        memory_budget_gb=need * 1.05,
    )
    assert len(runs) > 2 * len(calls)
    assert split.groups == whole.groups
    for name, basis in whole.bases.items():
        assert torch.allclose(split.bases[name].values, basis.values, rtol=1e-6, atol=1e-12)


def in_two_ways(layer, calls, settings, columns):
    """Return the basis found with a sketch of so many columns, the exact one, the moment, and the sketch's passes."""
    passes = []
    exact = calibrate_modules({"l": layer}, layer, lambda: iter(calls), settings, keep_moments=True)

    def again():
        passes.append(1)
        return iter(calls)

    budget = columns * 20 * layer.in_features / 1e9
    sketched = calibrate_modules({"l": layer}, layer, again, settings, memory_budget_gb=budget)
    moment = exact.moments["l"]["general"].double()
    return sketched.bases["l"], exact.bases["l"], moment, len(passes) - 1  # one call looks at the domains


@pytest.mark.parametrize(
    ("power", "massive", "protected", "passes"),
    [(1.0, 0.0, 15, 5), (1.0, 0.0, 45, 8), (0.7, 0.0, 30, 8), (1.0, 1000.0, 45, 3)],
)
def test_a_sketch_protects_the_energy_of_the_exact_basis(power, massive, protected, passes):
    """Power laws have no gap: a single pass over the text would miss 0.6 to 6 % of the energy."""
    width, columns = 256, 60
    torch.manual_seed(0)
    scale = torch.arange(1, width + 1).float().pow(-power / 2)
    scale[:3] += massive**0.5
    layer = nn.Linear(width, 2)
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    calls = [ForwardCall(args=((torch.randn(300, width) * scale) @ rotation,)) for _ in range(4)]
    settings = BasisSettings(criterion="rank", threshold=protected)
    ours, exact, moment, used = in_two_ways(layer, calls, settings, columns)

    def share(basis):
        u = basis.vectors.double()
        return float((u.T @ moment @ u).trace() / moment.trace())

    assert ours.vectors.shape == exact.vectors.shape == (width, protected)
    assert 0 <= share(exact) - share(ours) < 1e-3
    assert ours.choice.energy_left == pytest.approx(1 - share(ours), abs=1e-5)  # and it says what it protects
    assert used <= passes


def test_a_sketch_says_when_it_holds_fewer_directions_than_the_criterion_asks_for():
    layer = nn.Linear(64, 2)
    calls = [ForwardCall(args=(torch.randn(500, 64),))]
    settings = BasisSettings(criterion="energy", threshold=0.05)
    found = calibrate_modules({"l": layer}, layer, lambda: iter(calls), settings, memory_budget_gb=20 * 20 * 64 / 1e9)
    assert found.bases["l"].protected == 15
    assert "held by the sketch's 15 directions" in found.bases["l"].choice.reason
    with pytest.raises(ValueError, match="at least 16 are needed. Raise `memory_budget_gb`"):
        calibrate_modules({"l": layer}, layer, lambda: iter(calls), settings, memory_budget_gb=1e-6)


def test_domains_are_weighted_equally_and_can_be_left_out_without_a_second_pass():
    block = Block()
    few, many = batches(1, domains=["code"] * 3), batches(6, domains=["chat", "chat", "chat"])
    for call in few:
        call.args[0].mul_(torch.linspace(0, 2, 12))
    found = calibrate(block, few + many, keep_moments=True)
    assert found.domain_tokens == {"code": 18, "chat": 108}
    mean = (dense_moment(few) + dense_moment(many)) / 2
    assert torch.allclose(found.bases["q"].values, torch.linalg.eigvalsh(mean).flip(0), rtol=1e-5, atol=1e-9)
    without = found.recombined(BasisSettings(criterion="rank", threshold=3, without_domains=("code",)))
    reference = torch.linalg.eigvalsh(dense_moment(many)).flip(0)
    assert torch.allclose(without.bases["q"].values, reference, rtol=1e-4, atol=1e-6)
    assert without.settings.without_domains == ("code",)


def test_domains_within_a_batch_are_told_apart():
    block = Block()
    mixed = batches(4, domains=["a", "b", "a"])
    found = calibrate(block, mixed, keep_moments=True)
    rows = torch.cat([c.args[0][1][c.mask[1].bool()] for c in mixed if c.mask is not None]).double()
    assert (found.moments["q"]["b"] - rows.T @ rows / len(rows)).abs().max() < FLOAT32


def test_principal_angles_and_domain_report():
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(principal_cosines(identity[:, :2], identity[:, 1:3]), torch.tensor([1.0, 0.0]).double())
    report = domain_report({
        "a": torch.diag(torch.tensor([1.0, 1, 0, 0])),
        "b": torch.diag(torch.tensor([0.0, 1, 3, 0])),
    })
    assert report["a -> b"]["covered"] == pytest.approx(0.25)
    assert report["b -> a"]["covered"] == pytest.approx(0.5)
    assert report["a -> b"]["largest_angle_deg"] == pytest.approx(90)


def test_layers_that_were_never_called_and_empty_data_are_refused():
    block = Block()
    with pytest.raises(ValueError, match="1 of 2 layers saw no input .*: unused"):
        calibrate(block, batches(), modules={"q": block.q, "unused": block.unused})
    with pytest.raises(ValueError, match="got no batches"):
        calibrate(block, [])
    blank = [ForwardCall(args=c.args, mask=torch.zeros(3, 7)) for c in batches(1)]
    with pytest.raises(ValueError, match="every mask entry was False"):
        calibrate(block, blank)


def test_every_layer_without_null_directions_is_named_at_once():
    with pytest.raises(NoNullDirections, match=r"q \(width 12\): threshold >= "):
        calibrate(Block(), batches(), BasisSettings(criterion="energy", threshold=1e-9))


def test_hooks_are_removed_even_if_the_forward_fails():
    block = Block()
    with pytest.raises(RuntimeError):
        calibrate(block, [ForwardCall(args=(torch.randn(2, 3),))])
    assert not any(module._forward_hooks for module in block.modules())


def test_keyword_inputs_are_refused_by_name():
    layer = nn.Linear(3, 3)
    listening: InputCollector[SecondMoment] = InputCollector({"l": layer})
    with listening as collector:
        collector.begin()
        with pytest.raises(TypeError, match="l must be called with its input"):
            layer(input=torch.randn(2, 3))


def test_output_energy_is_the_mean_square_of_the_rows_that_count():
    block, calls = Block(), batches()
    found = calibrate(block, calls)
    rows = torch.cat([counted(block.q(c.args[0]), c) for c in calls]).detach()
    assert found.output_energy["q"] == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_files_give_back_what_was_saved(tmp_path, form):
    found = calibrate(Block(), batches(), BasisSettings(criterion="auto", form=form), keep_moments=True)
    found.fingerprint = {"model": {"weights": "a"}, "settings": found.settings.as_dict()}
    path = save_calibration(found, tmp_path / "deep" / "basis.safetensors")
    again = load_calibration(path)
    assert again.groups == found.groups
    assert again.settings.as_dict() == found.settings.as_dict()
    for name, basis in found.bases.items():
        assert torch.equal(again.bases[name].vectors, basis.vectors)
        assert torch.equal(again.bases[name].values, basis.values)
        assert again.bases[name].choice == basis.choice
        assert torch.equal(again.moments[name]["general"], found.moments[name]["general"])
    assert table_rows(again) == table_rows(found)
    assert [p.name for p in path.parent.iterdir()] == ["basis.safetensors"]  # no partial file is left


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no basis file at"):
        load_calibration(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "adapter.safetensors"))
    with pytest.raises(ValueError, match="without a null-space header"):
        load_calibration(tmp_path / "adapter.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_calibration(tmp_path / "broken.safetensors")


def test_a_fingerprint_mismatch_says_what_differs():
    with pytest.raises(ValueError, match="settings.threshold: the file has 0.1, this run wants 0.2"):
        check_fingerprint({"settings": {"threshold": 0.1}}, {"settings": {"threshold": 0.2}}, "x.safetensors")
