"""Cases in which a certificate could look clean while outputs on calibration text move: held, or refused by name."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from null_space_problems import (
    HIDDEN,
    OUT,
    PROTECTED,
    WIDTH,
    LoraLinear,
    Net,
    general_inputs,
    leak,
    projection,
    trainer,
)
from tiny_policies import move_adapter_
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HELD = 1e-6  # leak of a held layer, float32 rounding


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


class DenseNet(pl.LightningModule):
    """One trained linear layer of full weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, OUT, bias=False)
        self.start = self.layer.weight.detach().clone()
        self.samples, self.batch_size = 96, 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    training_step = Net.training_step
    train_dataloader = Net.train_dataloader
    calibration_dataloader = Net.calibration_dataloader

    def configure_optimizers(self) -> Any:
        return adamw(self.parameters())

    def moved(self) -> float:
        """Largest change of outputs on calibration inputs, relative, in float64."""
        x = general_inputs().double()
        change = x @ (self.layer.weight.detach().double() - self.start.double()).T
        return float(change.abs().max() / (x @ self.start.double().T).abs().max())


# ---------------------------------------------------------------------------------------------- several optimizers


class TwoOptimizers(Net):
    """A in one optimizer and B in another, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        downs = [p for n, p in self.named_parameters() if "lora_A" in n]
        ups = [p for n, p in self.named_parameters() if "lora_B" in n]
        return [adamw(ups), adamw(downs)]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def test_adapters_split_over_two_optimizers_are_held(tmp_path: Any) -> None:
    model = TwoOptimizers()
    trainer(tmp_path, projection()).fit(model)
    assert leak(model) <= HELD


# ---------------------------------------------------------------------------------------------- a second fit


def test_a_second_fit_with_another_model_is_calibrated_anew(tmp_path: Any) -> None:
    class Other(Net):
        def calibration_dataloader(self) -> DataLoader:
            generator = torch.Generator().manual_seed(99)
            rows = torch.randn(64, PROTECTED, generator=generator) @ torch.randn(PROTECTED, WIDTH, generator=generator)
            return DataLoader(TensorDataset(rows), batch_size=16)

    callback = projection()
    trainer(tmp_path, callback).fit(Net())
    model = Other()
    before = copy.deepcopy(model)
    trainer(tmp_path, callback).fit(model)
    rows = torch.cat([batch for (batch,) in model.calibration_dataloader()])
    moved = model.first(rows) - before.first(rows)
    assert float(moved.abs().max() / before.first(rows).abs().max()) < 1e-5


# ---------------------------------------------------------------------------------------------- unfrozen on the way


class Unfreeze(Callback):
    """Makes another layer trainable after three steps, as BaseFinetuning does."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and not pl_module.late.weight.requires_grad:
            pl_module.late.weight.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [pl_module.late.weight]})


class LateNet(Net):
    """Has a frozen layer that is unfrozen during fit."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(OUT, OUT, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(super().forward(x))


def test_parameters_unfrozen_during_fit_are_seen_at_the_next_step(tmp_path: Any) -> None:
    model = LateNet()
    before = model.late.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"late\.weight"):
        trainer(tmp_path, projection(), Unfreeze()).fit(model)
    assert torch.equal(model.late.weight, before)


def test_parameters_unfrozen_without_an_optimizer_do_no_harm(tmp_path: Any) -> None:
    """What no optimizer owns does not move."""

    class Only(Unfreeze):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.late.weight.requires_grad_(True)

    model = LateNet()
    trainer(tmp_path, projection(), Only()).fit(model)
    assert leak(model) <= HELD


# ---------------------------------------------------------------------------------------------- buffers


class Batched(Net):
    """Batch statistics between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


class Drifting(Net):
    """A buffer of the module's own that each training step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Buffer(torch.zeros(OUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.shift = self.shift + 0.1  # type: ignore[assignment]
        return super().forward(x) + self.shift


@pytest.mark.parametrize(("build", "name"), [(Batched, "norm"), (Drifting, "shift")])
def test_buffers_that_training_changes_are_refused_by_name(tmp_path: Any, build: Any, name: str) -> None:
    with pytest.raises(MisconfigurationException, match=name):
        trainer(tmp_path, projection()).fit(build())


def test_batch_statistics_can_be_frozen(tmp_path: Any) -> None:
    model = Batched()
    before = copy.deepcopy(model).eval()
    trainer(tmp_path, projection(unprotected="freeze")).fit(model)
    rows = general_inputs()
    with torch.no_grad():
        assert torch.equal(model.norm.running_mean, before.norm.running_mean)  # type: ignore[arg-type]
        moved = model.eval().first(rows) - before.first(rows)
    assert float(moved.abs().max()) < 1e-5


def test_a_counter_that_no_output_depends_on_is_no_reason_to_refuse(tmp_path: Any) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Buffer(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen += 1  # type: ignore[misc]
            return super().training_step(batch, batch_idx)

    model = Counting()
    trainer(tmp_path, projection()).fit(model)
    assert leak(model) <= HELD


# ---------------------------------------------------------------------------------------------- masks


class SequenceFirst(Net):
    """Runs its layers on (tokens, batch, features), while the mask is (batch, tokens)."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)

    def calibration_dataloader(self) -> Any:
        x = general_inputs(64).view(16, 4, WIDTH)
        mask = torch.ones(16, 4, dtype=torch.bool)
        mask[::2, 2:] = False
        return [(x, mask)]

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(6)
        x = torch.randn(self.samples, 3, WIDTH, generator=generator)
        return DataLoader(TensorDataset(x, torch.randn(self.samples, 3, OUT, generator=generator)), batch_size=8)


class Sorted(SequenceFirst):
    """Sorts its tokens before the layers, as routed experts do: as many rows, another order."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        order = flat[:, 0].argsort()
        out = Net.forward(self, flat[order])
        return out[order.argsort()].view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("build", [SequenceFirst, Sorted])
def test_a_mask_is_laid_over_rows_by_shape_and_not_by_count(tmp_path: Any, build: Any) -> None:
    callback = projection(batch_to_inputs=lambda batch: ((batch[0],), batch[1]))
    with pytest.raises((MisconfigurationException, ValueError), match="mask"):
        trainer(tmp_path, callback).fit(build())


# ---------------------------------------------------------------------------------------------- a frozen adapter beside


def test_a_frozen_adapter_beside_the_trained_one_stays_on_in_calibration(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.tanh(self.one(x)))

    class Adapted(Net):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, target_modules=["one", "two"])
            self.policy = peft.get_peft_model(Plain(), config, adapter_name="old")
            move_adapter_(self.policy, 0.3)
            self.policy.add_adapter("new", config)
            self.policy.base_model.set_adapter(["old", "new"])
            for name, parameter in self.policy.named_parameters():
                parameter.requires_grad_(".new." in name)
            self.samples, self.batch_size = 96, 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.policy(x)

        def configure_optimizers(self) -> Any:
            return adamw([p for p in self.parameters() if p.requires_grad])

    model = Adapted()
    rows = general_inputs(20)
    model.calibration_dataloader = lambda: [(rows,)]  # type: ignore[method-assign,assignment,return-value]
    before = model(rows).detach()
    callback = projection(criterion="energy", threshold=0.0)
    trainer(tmp_path, callback).fit(model)
    after = model.eval()(rows).detach()
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


# ---------------------------------------------------------------------------------------------- optimizers with weights


class ScheduleFree(torch.optim.Optimizer):
    """The core of schedule-free SGD: the parameter is a mean of z and x, and `eval()` puts x in its place."""

    def __init__(self, parameters: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "count": 0})

    def _swap(self, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)

    def eval(self) -> None:
        self._swap(1 - 1 / self.param_groups[0]["beta"])

    def train(self) -> None:
        self._swap(1 - self.param_groups[0]["beta"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["count"])
                noise = p.grad / (p.grad.abs() + 1e-8)  # Adam-like: leaves the subspace
                p.add_(noise, alpha=-group["lr"] * 0.1)
                z.sub_(noise, alpha=group["lr"])
        return loss


def test_an_optimizer_that_keeps_weights_of_its_own_is_refused_or_held(tmp_path: Any) -> None:
    class EvalAtEnd(Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].eval()  # type: ignore[attr-defined]

    model = Net(ScheduleFree)
    callback = projection()
    try:
        trainer(tmp_path, callback, EvalAtEnd()).fit(model)
    except MisconfigurationException as error:
        assert "ScheduleFree" in str(error)  # noqa: PT017
        return
    assert leak(model) <= HELD
    assert max(callback.certificate().values()) <= HELD


# ---------------------------------------------------------------------------------------------- resumed dense training


def test_dense_training_resumed_with_other_text_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "half.ckpt"
    first = trainer(tmp_path, projection(), max_steps=6)
    first.fit(DenseNet())
    first.save_checkpoint(path)

    class Other(DenseNet):
        def calibration_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(torch.randn(64, WIDTH)[:, torch.randperm(WIDTH)]), batch_size=16)

    with pytest.raises((MisconfigurationException, ValueError), match="data|text"):
        trainer(tmp_path, projection(), max_steps=12).fit(Other(), ckpt_path=path)


def test_a_certificate_after_a_resume_counts_from_the_start(tmp_path: Any) -> None:
    path = tmp_path / "half.ckpt"
    whole = projection()
    trainer(tmp_path, whole, max_steps=12).fit(DenseNet())
    first = trainer(tmp_path, projection(), max_steps=11)
    first.fit(DenseNet())
    first.save_checkpoint(path)
    resumed = projection()
    model = DenseNet()
    trainer(tmp_path, resumed, max_steps=12).fit(model, ckpt_path=path)
    assert model.moved() < 1e-5
    norms = [c.certificates()[0].update_norm for c in (whole, resumed)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


# ---------------------------------------------------------------------------------------------- a closure run twice


def test_the_soft_form_holds_with_a_closure_that_is_evaluated_several_times(tmp_path: Any) -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

    def once(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    bounds = {}
    for name, optimizer in (("lbfgs", lbfgs), ("sgd", once)):
        model = Net(optimizer)
        start = copy.deepcopy(model)
        callback = projection(criterion="auto", threshold=None, form="soft", softness=1e-6)
        trainer(tmp_path, callback).fit(model)
        rows = general_inputs()
        moved = (model.first(rows) - start.first(rows)).abs().max() / start.first(rows).abs().max()
        size = torch.linalg.vector_norm(model.first.update).clamp_min(1e-12)
        bounds[name] = float(moved / size)
    assert bounds["lbfgs"] < 3 * bounds["sgd"] + 1e-3


# ---------------------------------------------------------------------------------------------- later batches


class Attending(Net):
    """Two layers that read one tensor, unless there is a context: then the second reads that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LoraLinear(WIDTH, OUT), LoraLinear(WIDTH, OUT)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.first(x) + self.second(x if context is None else context)


def test_layers_that_share_an_input_in_the_first_batch_only_are_held_each_for_itself(tmp_path: Any) -> None:
    model = Attending()
    x, context = general_inputs(12), torch.randn(12, WIDTH)
    batches = [(x, None), (x, context)]
    callback = projection(
        criterion="energy", threshold=0.0, calibration=batches, batch_to_inputs=lambda batch: (batch, None)
    )
    before = [model(*batch).detach() for batch in batches]
    trainer(tmp_path, callback).fit(model)
    assert callback.calibration is not None
    assert callback.calibration.groups == {"first": ["first"], "second": ["second"]}
    for batch, was in zip(batches, before, strict=True):
        assert float((model(*batch) - was).abs().max() / was.abs().max()) < 1e-5


class Odd(Net):
    """Uses another weight for its third batch than the one whose inputs are seen."""

    def forward(self, x: torch.Tensor, odd: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.first(x)
        if odd is not None:
            hidden = hidden + 2.0 * self.first.up(self.first.down.weight.matmul(x.roll(1, -1).T).T)
        return self.second(torch.tanh(hidden))


def test_a_fault_in_another_kind_of_batch_is_seen(tmp_path: Any) -> None:
    x = general_inputs(8)
    batches = [(x,), (x,), (x, torch.ones(1)), (x,)]
    callback = projection(calibration=batches, batch_to_inputs=lambda batch: (batch, None))
    with pytest.raises(MisconfigurationException, match="'first'"):
        trainer(tmp_path, callback).fit(Odd())


class RawOptimizer(Net):
    """Makes an optimizer of its own in a training step, for a base weight that was frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw: torch.optim.Optimizer | None = None

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        weight = self.first.base_layer.weight
        weight.requires_grad_(True)
        self.raw = self.raw or torch.optim.SGD([weight], lr=0.1)
        self.raw.zero_grad()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        self.raw.step()


def test_an_optimizer_that_the_trainer_does_not_know_is_looked_at_too(tmp_path: Any) -> None:
    model = RawOptimizer()
    before = model.first.base_layer.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"first\.\w+\.weight"):
        trainer(tmp_path, projection()).fit(model)
    assert torch.equal(model.first.base_layer.weight, before)


class Late(Batched):
    """Puts its normalisation into train mode in the second epoch."""

    def on_train_epoch_start(self) -> None:
        self.norm.train(self.current_epoch > 0)


def test_statistics_that_begin_to_run_later_are_seen(tmp_path: Any) -> None:
    model = Late()
    model.norm.eval()
    with pytest.raises(MisconfigurationException, match="norm"):
        trainer(tmp_path, projection(), max_steps=30).fit(model)


def test_weights_that_something_else_moves_are_said(tmp_path: Any) -> None:
    class Shift(Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.first.down.weight.add_(0.1)

    with pytest.warns(UserWarning, match="left the null space"):
        trainer(tmp_path, projection(), Shift()).fit(Net())


@pytest.mark.parametrize("output", ["dict", "dataclass", "integers", "none"])
def test_whatever_a_forward_returns(tmp_path: Any, output: str) -> None:
    @dataclass
    class Out:
        y: torch.Tensor

    class Returns(Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            still = torch.ones(len(x), 2)
            return {
                "dict": {"still": still, "y": y},
                "dataclass": Out(y),
                "integers": y.argmax(-1),
                "none": None,
            }[output]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (Net.forward(self, batch[0]) - batch[1]).square().mean()

    if output in {"integers", "none"}:
        with pytest.raises(MisconfigurationException, match="verify: false"):
            trainer(tmp_path, projection()).fit(Returns())
        callback = projection(verify=False)
        trainer(tmp_path, callback).fit(Returns())
        assert callback.output_change is None
        return
    callback = projection()
    trainer(tmp_path, callback).fit(Returns())
    assert callback.output_change is not None
    assert callback.output_change > 0


def test_double_precision_and_noise_in_eval_mode_are_no_fault(tmp_path: Any) -> None:
    class Noisy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y + 0.1 * torch.randn_like(y)

    trainer(tmp_path, projection()).fit(Noisy())
    callback = projection()
    trainer(tmp_path, callback, precision="64-true").fit(Net())
    assert callback.verification is not None
    assert callback.verification.change < 1e-5
