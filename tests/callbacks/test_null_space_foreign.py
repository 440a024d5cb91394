"""A basis belongs to one model, and to what that became while it was held; every other is refused by what differs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from null_space_problems import HIDDEN, OUT, WIDTH, LoraLinear, Net, general_inputs, projection, trainer
from torch import nn

from nspo_lightning.cli.errors import is_users_mistake, message_for
from nspo_lightning.nullspace import Calibration, load_calibration, save_calibration


class Dense(pl.LightningModule):
    """Two whole layers, both of whose inputs on the text lie in few directions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))

    training_step = Net.training_step
    samples, batch_size = 96, 8
    train_dataloader = Net.train_dataloader
    calibration_dataloader = Net.calibration_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for all layers of `Net`."""
    folder, made = tmp_path_factory.mktemp("basis"), projection()
    trainer(folder, made, max_steps=1).fit(Net())
    return made.save(folder / "all.safetensors")


def moved(model: Net, name: str) -> Net:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    return model


class Wider(Net):
    """The names of `Net`, and another width in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LoraLinear(WIDTH, HIDDEN + 8), LoraLinear(HIDDEN + 8, OUT)


class Renamed(Net):
    """The weights of `Net`, in a layer that computes something else."""

    def __init__(self) -> None:
        super().__init__()

        class Doubled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        layer = Doubled(WIDTH, HIDDEN).requires_grad_(False)
        layer.load_state_dict(self.first.base_layer.state_dict())
        self.first.base_layer = layer


def is_on_one_screen(error: Exception) -> bool:
    """Whether the command line says it without a traceback, in 24 lines of 80 characters."""
    lines = message_for(error).splitlines()
    return is_users_mistake(error) and sum(max(1, -(-len(line) // 80)) for line in lines) <= 22


FOREIGN = {
    "a held layer's weights": (lambda: moved(Net(), "first.base_layer.weight"), "model.weights"),
    "another layer's weights": (lambda: moved(Net(), "second.base_layer.weight"), "model.weights"),
    "a bias": (lambda: moved(Net(), "second.base_layer.bias"), "model.weights"),
    "another width": (Wider, "model.weights"),
    "another kind of layer": (Renamed, "model.structure"),
}


@pytest.mark.parametrize("targets", [None, ["first"]])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_basis_is_refused_also_for_a_part_of_its_layers(
    basis: Path, tmp_path: Path, what: str, targets: Any
) -> None:
    build, message = FOREIGN[what]
    for unprotected in ("warn", "freeze") if targets else ("error",):
        callback = projection(calibration=basis, target_modules=targets, unprotected=unprotected)
        with pytest.raises(ValueError, match=rf"does not belong to this run:(?s:.*){message}") as caught:
            trainer(tmp_path, callback, max_steps=1).fit(build())
        assert is_on_one_screen(caught.value)


def test_buffers_and_precision_count_for_a_part_of_the_layers_too(tmp_path: Path) -> None:
    class Shifted(Net):
        def __init__(self, by: float = 0.5) -> None:
            super().__init__()
            self.register_buffer("by", torch.tensor(by))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.get_buffer("by"))

    made = projection()
    trainer(tmp_path, made, max_steps=1).fit(Shifted())
    file = made.save(tmp_path / "shifted.safetensors")
    part: dict[str, Any] = {"calibration": file, "target_modules": ["first"], "unprotected": "freeze"}
    trainer(tmp_path, projection(**part), max_steps=1).fit(Shifted())
    with pytest.raises(ValueError, match=r"model.buffers"):
        trainer(tmp_path, projection(**part), max_steps=1).fit(Shifted(0.7))
    with pytest.raises(ValueError, match=r"model.precision: the file has '32-true', this run wants 'bf16-mixed'"):
        trainer(tmp_path, projection(**part), max_steps=1, precision="bf16-mixed").fit(Shifted())


@pytest.mark.parametrize("unprotected", ["warn", "freeze"])
@pytest.mark.parametrize("adapted", [True, False])
def test_its_own_basis_is_taken_for_a_part_of_the_layers(
    basis: Path, tmp_path: Path, unprotected: str, adapted: bool
) -> None:
    model = Net()
    if not adapted:  # the same function with one adapter less
        setattr(model, "second", model.second.base_layer)  # noqa: B010 - another type than it had
    callback = projection(calibration=basis, target_modules=["first"], unprotected=unprotected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callback).fit(model)
    assert max(callback.certificate().values()) <= 1e-6


@pytest.mark.parametrize("unprotected", ["warn", "freeze"])
def test_a_run_that_goes_on_takes_the_basis_that_it_began_with_and_no_other(
    basis: Path, tmp_path: Path, unprotected: str
) -> None:
    options: dict[str, Any] = {"calibration": basis, "target_modules": ["first"], "unprotected": unprotected}
    saving = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=8, save_top_k=-1)
    trainer(tmp_path, projection(**options), saving, enable_checkpointing=True, max_steps=8).fit(Net())
    half = tmp_path / "half.ckpt"
    resumed = projection(**options)
    trainer(tmp_path, resumed, max_steps=16).fit(Net(), ckpt_path=half)
    assert max(resumed.certificate().values()) <= 1e-6
    other = projection()
    trainer(tmp_path, other, max_steps=1).fit(moved(Net(), "first.base_layer.weight"))
    foreign = projection(**options | {"calibration": other.save(tmp_path / "other.safetensors")})
    with pytest.raises(ValueError, match=r"model.weights"):
        trainer(tmp_path, foreign, max_steps=16).fit(Net(), ckpt_path=half)


def test_a_file_that_does_not_say_what_it_is_for_is_refused(basis: Path, tmp_path: Path) -> None:
    silent: Calibration = load_calibration(basis)
    del silent.fingerprint["model"]["weights"]
    file = save_calibration(silent, tmp_path / "silent.safetensors")
    with pytest.raises(ValueError, match=r"model.weights: the file has None"):
        trainer(tmp_path, projection(calibration=file), max_steps=1).fit(Net())


def test_what_was_saved_after_a_fit_holds_the_model_that_was_trained(tmp_path: Path) -> None:
    """README's own lines: `keep.save(...)`, then `NullSpaceProjection(calibration=...)`, on whole weights."""
    keep, model, text = projection(), Dense(), general_inputs()
    before = model(text)
    trainer(tmp_path, keep).fit(model)
    file = keep.save(tmp_path / "old_task.safetensors")
    for first in (False, True):  # the model that was trained, and the one that it began as
        again, trained = projection(calibration=str(file)), Dense()
        if not first:
            trained.load_state_dict(model.state_dict())
        start = {name: value.clone() for name, value in trained.state_dict().items()}
        trainer(tmp_path, again).fit(trained)
        assert max(again.certificate().values()) <= 1e-6
        assert all(not torch.equal(value, start[name]) for name, value in trained.state_dict().items())
        assert float((trained(text) - before).abs().max()) <= 1e-4 * float(before.abs().max())
    other = Dense()
    with torch.no_grad():
        other.first.weight.add_(0.01)
    with pytest.raises(ValueError, match=r"model.weights"):
        trainer(tmp_path, projection(calibration=str(file)), max_steps=1).fit(other)


@pytest.mark.parametrize("what", ["first.weight", "beside"])
def test_what_something_else_moved_is_not_said_to_be_the_bases_own(tmp_path: Path, what: str) -> None:
    class Beside(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.beside = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.beside)

    keep, model = projection(), Beside()
    trainer(tmp_path, keep).fit(model)
    with torch.no_grad():
        model.get_parameter(what).add_(0.1)
    file = keep.save(tmp_path / "old_task.safetensors")
    with pytest.raises(ValueError, match=r"model.weights"):
        trainer(tmp_path, projection(calibration=file), max_steps=1).fit(model)


def test_a_second_fit_of_one_callback_keeps_the_basis_of_its_file(tmp_path: Path) -> None:
    made = projection()
    trainer(tmp_path, made, max_steps=1).fit(Dense())
    keep, model = projection(calibration=made.save(tmp_path / "basis.safetensors")), Dense()
    for _ in range(2):
        trainer(tmp_path, keep, max_steps=8).fit(model)
    assert max(keep.certificate().values()) <= 1e-6


def test_layers_that_are_not_in_the_file_are_named(basis: Path, tmp_path: Path) -> None:
    model = Net()
    model.third = LoraLinear(OUT, OUT)
    with pytest.raises(MisconfigurationException, match=r"no basis for 1 trained layer: \['third'\]") as caught:
        trainer(tmp_path, projection(calibration=basis), max_steps=1).fit(model)
    assert is_on_one_screen(caught.value)
