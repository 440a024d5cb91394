"""Layers that no calibration text reaches: refused, or frozen and named, and the others are held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from null_space_problems import HIDDEN, OUT, PROTECTED, Net, general_inputs, leak, trainer
from torch import nn

from nspo_lightning.callbacks import NullSpaceProjection


class TwoWays(Net):
    """A layer that pictures take and text does not: training does, calibration does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = nn.Linear(HIDDEN, OUT, bias=False)
        self.start = self.pictures.weight.detach().clone()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return (self(x) + self.pictures(torch.tanh(self.first(x))) - y).square().mean()


def projection(**options: Any) -> NullSpaceProjection:
    settings: dict[str, Any] = {"criterion": "rank", "threshold": PROTECTED, "cache_dir": None}
    return NullSpaceProjection(**(settings | options))


def test_they_are_refused_with_the_settings_that_help(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 3 layers saw no input.*pictures.*unprotected='freeze'.*target_modules"):
        trainer(tmp_path, projection()).fit(TwoWays())


@pytest.mark.parametrize("once", [False, True], ids=["a dataloader", "a generator"])
def test_frozen_they_stay_and_the_others_are_held(tmp_path, once):
    model = TwoWays()
    text = ((general_inputs()[i : i + 16],) for i in range(0, 64, 16)) if once else None
    callback = projection(unprotected="freeze", calibration=text)
    with pytest.warns(UserWarning, match=r"1 layers have no basis.*do not train: pictures"):
        trainer(tmp_path, callback).fit(model)
    assert torch.equal(model.pictures.weight, model.start)
    assert leak(model) <= 1e-6
    assert sorted(callback.certificate()) == ["first", "second"]


def test_with_a_warning_they_train_freely(tmp_path):
    model = TwoWays()
    with pytest.warns(UserWarning, match=r"train freely.*: pictures"):
        trainer(tmp_path, projection(unprotected="warn")).fit(model)
    assert not torch.equal(model.pictures.weight, model.start)
    assert leak(model) <= 1e-6


@pytest.mark.parametrize("cache_dir", ["auto", None])
def test_a_resumed_run_freezes_them_again(tmp_path, cache_dir):
    path, whole = tmp_path / "half.ckpt", TwoWays()
    trainer(tmp_path, projection(unprotected="freeze", cache_dir=cache_dir), max_steps=12).fit(whole)
    first = trainer(tmp_path, projection(unprotected="freeze", cache_dir=cache_dir), max_steps=6)
    first.fit(TwoWays())
    first.save_checkpoint(path)
    model = TwoWays()
    trainer(tmp_path, projection(unprotected="freeze", cache_dir=cache_dir), max_steps=12).fit(model, ckpt_path=path)
    assert torch.equal(model.pictures.weight, model.start)
    assert leak(model) <= 1e-6


def test_nothing_left_to_hold_is_said(tmp_path):
    callback = projection(unprotected="freeze", target_modules=["pictures"])
    with pytest.raises(Exception, match="found no trained LoRA adapter or linear layer"):
        trainer(tmp_path, callback).fit(TwoWays())
