"""How many products a step's projections are, what memory they hold, in which precision, and that nothing waits."""

from __future__ import annotations

from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from null_space_problems import WIDTH, LoraLinear, Net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.callbacks.null_space.inference import plain_outputs
from nspo_lightning.compat.torch import float32_backends, full_precision_products
from nspo_lightning.nullspace import ForwardCall, apply, build_basis, calibrate_modules, choose_rank, plan_layers
from nspo_lightning.nullspace.basis import Basis, Spectrum
from nspo_lightning.nullspace.basis_settings import BasisSettings
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.keeper import NullSpaceKeeper
from nspo_lightning.nullspace.sketch import RangeSketch, sketch_spectrum

FLOAT32 = 1e-6
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}
# What makes the host wait for the device: numbers read, shapes that depend on values, comparisons.
WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten.unique_consecutive,
}


class Watching(TorchDispatchMode):
    """Counts kernels, and notes the precision that products run in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket] += 1
        if func.overloadpacket in PRODUCTS:
            self.precisions |= {backend.fp32_precision for backend in float32_backends()}
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.seen[op] for op in PRODUCTS)

    @property
    def waits(self) -> dict[object, int]:
        return {op: self.seen[op] for op in WAITING if self.seen[op]}


def held(count: int, width: int = 40, out: int = 6) -> tuple[list[LoraLinear], list[Basis], NullSpaceKeeper]:
    """Adapters whose bases have as many columns as an `auto` cut gives: below and above half the width."""
    model = [LoraLinear(width, out) for _ in range(count)]
    values, bases = torch.linspace(2, 1, width, dtype=torch.float64), []
    for index in range(count):
        vectors = torch.linalg.qr(torch.randn(width, width)).Q
        choice = choose_rank(values, "rank", round(width * (0.35 + 0.3 * (7 * index % 17) / 16)))
        bases.append(build_basis(Spectrum(values=values, vectors=vectors, tokens=9), choice))
    assert count < 3 or len({basis.complement for basis in bases}) == 2
    return model, bases, NullSpaceKeeper(plan_layers(nn.ModuleList(model)).layers, bases)


@pytest.mark.parametrize("count", [3, 24])
def test_a_step_is_two_products_a_projection_however_many_layers_there_are(count):
    model, _, keeper = held(count)
    for layer in model:
        layer.down.weight.grad = torch.randn_like(layer.down.weight)
    with Watching() as kernels:
        keeper.project_gradients_(measure=True)
        keeper.reproject_()
    assert kernels.products == 4
    assert kernels.waits == {}


def test_the_products_are_those_of_single_matrices():
    model, bases, keeper = held(24)
    gradients = [torch.randn_like(layer.down.weight) for layer in model]
    for layer, gradient in zip(model, gradients, strict=True):
        layer.down.weight.grad = gradient.clone()
    weights = [layer.down.weight.detach().clone() for layer in model]
    keeper.project_gradients_()
    keeper.reproject_()
    for layer, basis, gradient, weight in zip(model, bases, gradients, weights, strict=True):
        assert layer.down.weight.grad is not None
        assert (layer.down.weight.grad - apply(basis, gradient)).abs().max() < FLOAT32
        assert (layer.down.weight - apply(basis, weight)).abs().max() < FLOAT32


def test_bases_are_kept_once():
    """Stacking must not double what is the largest thing that a run holds beside the model."""
    model, bases, _ = held(24, width=400)
    before = [basis.vectors.clone() for basis in bases]
    NullSpaceKeeper(plan_layers(nn.ModuleList(model)).layers, bases)  # again, as a second fit does
    storages = {basis.vectors.untyped_storage().data_ptr(): basis.vectors.untyped_storage() for basis in bases}
    assert len(storages) == 1
    assert sum(storage.nbytes() for storage in storages.values()) < 1.3 * sum(basis.vectors.nbytes for basis in bases)
    for basis, copy in zip(bases, before, strict=True):
        assert torch.equal(basis.vectors, copy)


@pytest.fixture
def low_precision():
    """What Lightning advises on a GPU; it also chooses bfloat16 products on CPUs that have them."""
    if not all(hasattr(backend, "fp32_precision") for backend in float32_backends()):
        pytest.skip("torch before 2.9 does not say which precision is in force")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


def test_low_precision_products_are_kept_out_of_the_null_space(low_precision):
    _, _, keeper = held(3)
    moment = SecondMoment(300)
    with Watching() as kernels:
        keeper.start_()
        keeper.reproject_()
        moment.update(torch.randn(4000, 300))
        moment.total()
        sketch = RangeSketch(64, torch.randn(64, 20))
        sketch.update(torch.randn(30, 64))
        sketch_spectrum(torch.eye(64)[:, :9], torch.eye(64)[:, :9], probes=torch.eye(64)[:, :10], trace=9.0, tokens=9)
    assert kernels.products > 12
    assert kernels.precisions == {"ieee"}


def test_the_model_that_is_calibrated_keeps_what_the_user_chose(low_precision):
    layer, kernels = nn.Linear(64, 2), Watching()

    def forward(x):
        with kernels:
            layer(x)

    settings = BasisSettings(criterion="rank", threshold=5)
    calibrate_modules({"l": layer}, forward, lambda: [ForwardCall(args=(torch.randn(50, 64),))], settings)
    assert kernels.precisions == {"tf32", "bf16"}


def test_the_choice_is_restored_after_an_error(low_precision):
    with pytest.raises(RuntimeError, match="inside"), full_precision_products():
        raise RuntimeError("inside")


def test_outputs_that_are_compared_are_those_of_full_precision(low_precision):
    module = Net()
    with Watching() as kernels:
        plain_outputs(ForwardCall(args=(torch.randn(4, WIDTH),)), module)
    assert kernels.precisions == {"ieee"}


class NoWaiting(NullSpaceProjection):
    """The callback, watched in every hook of a step."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.watched = Watching()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with self.watched:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_start(self, *args):
        with self.watched:
            super().on_train_batch_start(*args)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:  # looks at buffers, once an epoch
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        with self.watched:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


@pytest.mark.parametrize(("every", "waits"), [(100, False), (1, True)])
def test_between_logged_steps_the_host_never_waits(tmp_path, every, waits):
    callback = NoWaiting(criterion="rank", threshold=10, cache_dir=None)
    trainer = pl.Trainer(
        max_epochs=1,
        log_every_n_steps=every,
        logger=pl.loggers.CSVLogger(tmp_path),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    reproject = NullSpaceKeeper.reproject_

    def watched(self):
        with callback.watched:
            reproject(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullSpaceKeeper, "reproject_", watched)
        trainer.fit(Net())
    assert callback.watched.products >= 4 * trainer.global_step
    assert bool(callback.watched.waits) is waits
