"""Basis files, the cache, checkpoints and resuming."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from null_space_problems import PROTECTED, Net, general_inputs, leak, trainer

from nspo_lightning.callbacks import NullSpaceProjection

LEAK = 1e-6


def projection(**options: Any) -> NullSpaceProjection:
    settings: dict[str, Any] = {"criterion": "rank", "threshold": PROTECTED}
    return NullSpaceProjection(**(settings | options))


def weights(model: Net) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}


def interrupted(tmp_path, first=None, second=None):
    saving = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=12, save_top_k=-1)
    options = {"enable_checkpointing": True, "max_steps": 12}
    trainer(tmp_path, first or projection(), saving, **options).fit(Net())
    model = Net()
    trainer(tmp_path, second or projection(), max_steps=24).fit(model, ckpt_path=tmp_path / "half.ckpt")
    return model


@pytest.mark.parametrize("cache", ["auto", None])
def test_resumed_training_ends_where_uninterrupted_training_ends(tmp_path, cache):
    whole = Net()
    trainer(tmp_path, projection(cache_dir=cache), max_steps=24).fit(whole)
    resumed = interrupted(tmp_path, projection(cache_dir=cache), projection(cache_dir=cache))
    assert leak(resumed) <= LEAK
    for name, value in weights(whole).items():
        assert torch.allclose(weights(resumed)[name], value, rtol=1e-4, atol=1e-6), name


class MeasuresAtTheEnd(pl.Callback):
    """As `RunReport` does, before the projection's own end."""

    def __init__(self, measured: NullSpaceProjection) -> None:
        self.measured = measured

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.measured.measure_outputs(trainer, pl_module)


def test_a_run_killed_behind_its_last_checkpoint_is_measured_as_it_would_have_been(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=24, save_top_k=-1)
    whole, again = projection(), projection()
    trainer(tmp_path, MeasuresAtTheEnd(whole), whole, saving, enable_checkpointing=True, max_steps=24).fit(Net())
    trainer(tmp_path, MeasuresAtTheEnd(again), again, max_steps=24).fit(Net(), ckpt_path=tmp_path / "end.ckpt")
    assert whole.output_change
    assert again.output_change == whole.output_change


def test_the_checkpoint_holds_a_fingerprint_and_no_basis(tmp_path):
    callback = projection()
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=24, save_top_k=-1)
    trainer(tmp_path, callback, saving, enable_checkpointing=True).fit(Net())
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert set(state) == {"started", "settings", "fingerprint", "path", "kept"}
    assert len(str(state)) < 2000
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    model = Net()
    model.load_state_dict(saved)
    assert leak(model) <= LEAK  # the checkpoint was written after the projection


def test_resuming_with_another_setting_says_what_differs(tmp_path):
    with pytest.raises(ValueError, match=r"settings.threshold: the file has 10, this run wants 4"):
        interrupted(tmp_path, second=projection(threshold=4))


def test_a_checkpoint_trained_without_projection_is_refused(tmp_path):
    foreign = projection(project_displacement=False, project_initialization=False, project_gradients=False)
    with pytest.raises(MisconfigurationException, match="does not lie in the null space of this basis"):
        interrupted(tmp_path, first=foreign)


def test_the_cache_is_used_for_the_same_text_and_not_for_another(tmp_path):
    trainer(tmp_path, projection(), max_steps=1).fit(Net())
    files = list((tmp_path / "nullspace").iterdir())
    assert len(files) == 1
    again = projection()
    trainer(tmp_path, again, max_steps=1).fit(Net())
    assert again.source.path == str(files[0])
    assert len(list((tmp_path / "nullspace").iterdir())) == 1
    trainer(tmp_path, projection(calibration=[general_inputs(32)]), max_steps=1).fit(Net())
    assert len(list((tmp_path / "nullspace").iterdir())) == 2


def test_a_saved_basis_is_taken_and_gives_the_same_training(tmp_path):
    first = projection(cache_dir=None)
    model = Net()
    trainer(tmp_path, first).fit(model)
    path = first.save(tmp_path / "basis.safetensors")
    second = Net()
    trainer(tmp_path, projection(calibration=path, cache_dir=None)).fit(second)
    for name, value in weights(model).items():
        assert torch.equal(weights(second)[name], value), name


@pytest.mark.parametrize("what", ["model", "settings", "layers"])
def test_a_basis_of_something_else_is_refused(tmp_path, what):
    first = projection(cache_dir=None, target_modules=["first"] if what == "layers" else None, unprotected="warn")
    trainer(tmp_path, first, max_steps=1).fit(Net())
    path = first.save(tmp_path / "basis.safetensors")
    model = Net()
    if what == "model":
        with torch.no_grad():
            model.first.base_layer.weight.add_(1)
    options = {"threshold": 3} if what == "settings" else {}
    match = {"model": "model.weights", "settings": "settings.threshold", "layers": "has no basis for 1 trained layer"}
    with pytest.raises((ValueError, MisconfigurationException), match=match[what]):
        trainer(tmp_path, projection(calibration=path, **options)).fit(model)


def test_fitting_again_goes_on_from_where_the_adapter_is(tmp_path):
    callback, model = projection(cache_dir=None), Net()
    trainer(tmp_path, callback, max_steps=8).fit(model)
    trainer(tmp_path, callback, max_steps=8).fit(model)  # B is not zero now, and that is legitimate
    assert leak(model) <= LEAK


def test_load_from_checkpoint_is_not_disturbed(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=24, save_top_k=-1)
    model = Net()
    trainer(tmp_path, projection(), saving, enable_checkpointing=True).fit(model)
    loaded = Net.load_from_checkpoint(tmp_path / "end.ckpt")
    for name, value in weights(model).items():
        assert torch.equal(weights(loaded)[name], value)
