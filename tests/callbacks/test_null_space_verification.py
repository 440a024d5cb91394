"""Before the first step the function itself is asked: what moves outputs on calibration text is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from null_space_problems import HIDDEN, OUT, PROTECTED, WIDTH, LoraLinear, Net, general_inputs, trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from nspo_lightning.callbacks import NullSpaceProjection

CONTROL = 1e-5  # largest relative change of outputs that rounding makes


class Problem(Net):
    """The two-layer problem with one thing about it that hooks do not see."""

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or self.first  # type: ignore[assignment]
        self.second = second or self.second  # type: ignore[assignment]


class Functional(LoraLinear):
    """Uses A's weight without calling it, on another input, after calling itself for show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = functional.linear(x.roll(1, -1), self.lora_A["default"].weight)  # type: ignore[arg-type]
        return self.base_layer(x) + 2.0 * self.lora_B["default"](down)


class Normalising(nn.Linear):
    """A Linear subclass that changes its input before using it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.layer_norm(x, x.shape[-1:]))


class InPlaceResidual(pl.LightningModule):
    """Two readers of one tensor, changed in place between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = LoraLinear(WIDTH, WIDTH), LoraLinear(WIDTH, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        first = torch.tanh(self.one(x))
        x += first
        return self.two(x)

    training_step = Net.training_step
    train_dataloader = Net.train_dataloader
    calibration_dataloader = Net.calibration_dataloader
    samples, batch_size = 96, 8

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class OnePosition(Net):
    """Runs its head at the last position only while it calibrates."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden)

    def calibration_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))[:, -1:])

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(6)
        x = torch.randn(self.samples, 3, WIDTH, generator=generator)
        return DataLoader(TensorDataset(x, torch.randn(self.samples, 3, OUT, generator=generator)), batch_size=8)

    def calibration_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(general_inputs(63).view(21, 3, WIDTH)), batch_size=1)


FAULTS: dict[str, tuple[Callable[[], pl.LightningModule], str]] = {
    "functional use of a weight": (lambda: Problem(first=Functional(WIDTH, HIDDEN)), "first"),
    "a subclass that changes its input": (lambda: Problem(first=Normalising(WIDTH, HIDDEN, bias=False)), "first"),
    "a head calibrated at one position": (OnePosition, "second"),
}


def fit(model: pl.LightningModule, folder: Any, **options: Any) -> NullSpaceProjection:
    settings: dict[str, Any] = {"criterion": "rank", "threshold": PROTECTED, "cache_dir": None}
    callback = NullSpaceProjection(**(settings | options))
    trainer(folder, callback, max_steps=4).fit(model)
    return callback


@pytest.mark.parametrize("criterion", [("energy", 1e-2), ("auto", None), ("rank", PROTECTED)])
def test_a_sound_model_passes_and_is_put_back_to_the_bit(tmp_path, criterion):
    model = Net()
    callback = fit(model, tmp_path, criterion=criterion[0], threshold=criterion[1])
    assert callback.verification is not None
    assert callback.verification.change < CONTROL
    assert callback.verification.layers == 2
    other = Net()
    fit(other, tmp_path, criterion=criterion[0], threshold=criterion[1], verify=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("fault", FAULTS)
def test_what_hooks_do_not_see_is_refused_by_name(tmp_path, fault):
    build, name = FAULTS[fault]
    with pytest.raises(MisconfigurationException, match=rf"'(\w+\.)*{name}'"):
        fit(build(), tmp_path)


def test_a_tensor_that_is_changed_in_place_is_another_input():
    model = InPlaceResidual()
    callback = NullSpaceProjection(criterion="rank", threshold=PROTECTED, cache_dir=None)
    calibration = callback.calibrate(model, DataLoader(TensorDataset(general_inputs()), batch_size=16))
    assert calibration.groups == {"one": ["one"], "two": ["two"]}


def test_it_can_be_turned_off_and_says_how_it_went(tmp_path):
    assert fit(Problem(first=Functional(WIDTH, HIDDEN)), tmp_path, verify=False).verification is None
    found = fit(Net(), tmp_path).verification
    assert found is not None
    assert (found.layers, found.without_room) == (2, ())
    assert found.calls >= 1


def test_a_text_is_cut_until_there_is_room(tmp_path, tiny_llama):
    """4 of 64 directions are free, and the texts have many more tokens than that."""
    from tiny_jobs import datamodule, module
    from tiny_jobs import trainer as job

    callback = NullSpaceProjection(criterion="null_share", threshold=6 / 64, cache_dir=None)
    job(tmp_path, steps=1, callbacks=[callback]).fit(module(tiny_llama), datamodule())
    assert callback.verification is not None
    assert callback.verification.without_room == ()
    assert callback.verification.change < CONTROL


def test_a_layer_whose_null_space_the_rows_fill_is_moved_beside_it(tmp_path):
    """One of 24 directions is free, and one row fills it: what is asked, and what is found, stays the same."""
    found = fit(Net(), tmp_path, criterion="null_share", threshold=1 / 25).verification
    assert found is not None
    assert (found.layers, found.without_room) == (2, ())
    assert found.change < CONTROL
    with pytest.raises(MisconfigurationException, match="'first'"):
        fit(Problem(first=Functional(WIDTH, HIDDEN)), tmp_path, criterion="null_share", threshold=1 / 25)


def test_a_head_that_is_trained_is_calibrated_at_every_position(tmp_path, tiny_llama):
    """A trained head is read at each position, so the cheap forward that makes the last logits only is not enough."""
    from tiny_jobs import datamodule, module
    from tiny_jobs import trainer as job

    from nspo_lightning.policy import LoraSettings, PolicySettings

    settings = PolicySettings(
        path=str(tiny_llama), quantization="none", dtype="float32", lora=LoraSettings(r=4, target_modules=["lm_head"])
    )
    callback = NullSpaceProjection(criterion="rank", threshold=0.5, cache_dir=None)
    job(tmp_path, steps=2, callbacks=[callback]).fit(module(tiny_llama, policy=settings), datamodule())
    assert callback.calibration is not None
    assert callback.verification is not None
    assert callback.verification.change < CONTROL
    tokens = next(iter(callback.calibration.bases.values())).tokens
    assert tokens == sum(callback.calibration.domain_tokens.values()) > 100  # not one a text
