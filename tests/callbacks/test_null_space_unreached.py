"""Layers that no calibration text reaches: refused, or frozen and named, and the others are held."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from null_space_problems import HIDDEN, OUT, Net, general_inputs, leak, projection, trainer
from torch import nn

from nspo_lightning.cli.calibrate import calibrate
from nspo_lightning.nullspace import UnheldLayersError


class TwoWays(Net):
    """A layer that pictures take and text does not: training does, calibration does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = nn.Linear(HIDDEN, OUT, bias=False)
        self.start = self.pictures.weight.detach().clone()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return (self(x) + self.pictures(torch.tanh(self.first(x))) - y).square().mean()


def test_they_are_refused_with_the_settings_that_help(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 3 layers saw no input.*pictures.*unprotected='freeze'.*target_modules"):
        trainer(tmp_path, projection()).fit(TwoWays())


@pytest.mark.parametrize("once", [False, True], ids=["a dataloader", "a generator"])
def test_frozen_they_stay_and_the_others_are_held(tmp_path, once):
    model = TwoWays()
    text = ((general_inputs()[i : i + 16],) for i in range(0, 64, 16)) if once else None
    callback = projection(unprotected="freeze", calibration=text)
    with pytest.warns(UserWarning, match=r"1 layer has no basis.*, frozen: pictures"):
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
    with pytest.raises(MisconfigurationException, match="found no trained LoRA adapter or linear layer"):
        trainer(tmp_path, callback).fit(TwoWays())


class Text(pl.LightningDataModule):
    def calibration_dataloader(self) -> Any:
        return Net().calibration_dataloader()


@pytest.mark.parametrize("unprotected", ["error", "warn", "freeze"])
def test_a_basis_file_of_other_target_modules_is_refused(tmp_path, unprotected):
    made = projection(target_modules=["first"], unprotected="warn")
    trainer(tmp_path, made, max_steps=1).fit(Net())
    file = made.save(tmp_path / "first.safetensors")
    with pytest.raises(MisconfigurationException, match=r"no basis for 1 trained layer: \['second'\].*target_modules"):
        trainer(tmp_path, projection(calibration=file, unprotected=unprotected), max_steps=1).fit(Net())


def basis_file(folder: Any, by: str) -> Any:
    """Return a basis file of `TwoWays`, written by the subcommand or by a fit."""
    made, path = projection(unprotected="freeze"), folder / "basis.safetensors"
    if by == "calibrate":
        job = trainer(folder, made)
        calibrate(TwoWays(), Text(), out=path, projection=made, keep_moments=None, trainer=job)
        return path
    trainer(folder, made, max_steps=1).fit(TwoWays())
    return made.save(path)


@pytest.mark.parametrize("by", ["calibrate", "fit"])
def test_a_basis_file_knows_the_layers_that_no_text_reached(tmp_path, by):
    file = basis_file(tmp_path, by)
    model = TwoWays()
    with pytest.warns(UserWarning, match=r"1 layer has no basis.*, frozen: pictures"):
        trainer(tmp_path, projection(calibration=file, unprotected="freeze")).fit(model)
    assert torch.equal(model.pictures.weight, model.start)
    assert leak(model) <= 1e-6
    with pytest.raises(UnheldLayersError, match=r"1 of 3 layers saw no input.*pictures"):
        trainer(tmp_path, projection(calibration=file)).fit(TwoWays())


def test_calibrate_says_which_layers_no_text_reached(tmp_path, capsys):
    basis_file(tmp_path, "calibrate")
    assert "No calibration text reaches 1 layer: pictures" in capsys.readouterr().out
    made = projection()
    out, job = tmp_path / "other.safetensors", trainer(tmp_path, made)
    with pytest.raises(UnheldLayersError, match="1 of 3 layers saw no input"):
        calibrate(TwoWays(), Text(), out=out, projection=made, keep_moments=None, trainer=job)


def test_they_cost_no_pass_of_their_own_and_the_cache_knows_them(tmp_path):
    def forwards(model: Net, cache_dir: Any) -> int:
        seen: list[int] = []
        model.first.register_forward_hook(lambda *_: seen.append(1))
        trainer(tmp_path, projection(unprotected="warn", cache_dir=cache_dir, verify=False), max_steps=1).fit(model)
        return len(seen)

    plain = [forwards(Net(), tmp_path / "plain") for _ in range(2)]
    assert plain[0] > plain[1]
    once_more = 1  # its training step calls `first` twice
    assert [forwards(TwoWays(), tmp_path / "two") - once_more for _ in range(2)] == plain
