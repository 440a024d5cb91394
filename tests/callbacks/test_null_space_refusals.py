"""What cannot be held is refused with the way out, and every mistake says what was expected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from null_space_problems import Net, general_inputs, leak, projection, trainer
from torch import nn


class WithNorm(Net):
    """A trained scale between the layers: nothing can hold it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)

    def forward(self, x):
        return self.second(self.norm(torch.tanh(self.first(x))))


def test_by_default_an_unprotected_parameter_is_an_error_that_names_it(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"(?s)norm\.weight: a trained scale.*`unprotected='freeze'`"):
        trainer(tmp_path, projection()).fit(WithNorm())


def test_freeze_does_not_train_it(tmp_path):
    model = WithNorm()
    trainer(tmp_path, projection(unprotected="freeze")).fit(model)
    assert torch.equal(model.norm.weight, torch.ones(24))
    assert not model.norm.weight.requires_grad


def test_warn_trains_it_and_says_so(tmp_path):
    model = WithNorm()
    with pytest.warns(UserWarning, match=r"norm\.weight"):
        trainer(tmp_path, projection(unprotected="warn")).fit(model)
    assert not torch.equal(model.norm.weight, torch.ones(24))


def test_an_adapter_that_was_trained_before_is_refused(tmp_path):
    model = Net()
    nn.init.normal_(model.first.up.weight)
    with pytest.raises(MisconfigurationException, match="Merge the adapter into its base first"):
        trainer(tmp_path, projection()).fit(model)


def test_with_b_frozen_the_displacement_of_a_is_held(tmp_path):
    model = Net()
    nn.init.normal_(model.first.up.weight).requires_grad_(False)
    start = model.first.update
    before = model.first(general_inputs()).detach()
    trainer(tmp_path, projection()).fit(model)
    assert (model.first.update - start).norm() > 1e-2
    after = model.first(general_inputs()).detach()
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused(tmp_path, dtype):
    with pytest.raises(MisconfigurationException, match="Keep trained weights in float32: precision='bf16-mixed'"):
        trainer(tmp_path, projection()).fit(Net().to(dtype))


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_hide_weights_are_refused_in_setup(strategy):
    import lightning.pytorch.strategies as strategies

    hiding = getattr(strategies, strategy)
    pretend: Any = SimpleNamespace(callbacks=(), strategy=object.__new__(hiding))
    with pytest.raises(MisconfigurationException, match=f"cannot run under {strategy}.*ModelParallelStrategy"):
        projection().setup(pretend, Net(), "fit")


def test_nothing_to_calibrate_on(tmp_path):
    class Without(Net):
        calibration_dataloader = None  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match=r"neither the datamodule nor the module has"):
        trainer(tmp_path, projection()).fit(Without())


def test_nothing_to_hold(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"lies outside `target_modules`"):
        trainer(tmp_path, projection(target_modules=["third"])).fit(Net())
    with pytest.raises(MisconfigurationException, match=r"found no trained LoRA adapter .* among target_modules"):
        trainer(tmp_path, projection(target_modules=["third"], unprotected="freeze")).fit(Net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unprotected": "ignore"}, "must be 'error', 'warn' or 'freeze'"),
        ({"target_modules": "("}, r"'\(' is none: .*give a list"),
        ({"criterion": "median"}, "`criterion` must be one of"),
        ({"criterion": "energy", "threshold": 2.0}, r"must lie in \[0, 1\)"),
        ({"form": "medium"}, "`form` must be one of hard, soft"),
        ({"subspace": "all"}, "`subspace` must be one of"),
        ({"softness": 0.0}, "`softness` must be positive"),
        ({"min_null_share": 1.0}, "`min_null_share` must lie in"),
        ({"limit_batches": -1}, "`limit_batches` must be positive, got -1"),
        ({"memory_budget_gb": 0.0}, "`memory_budget_gb` must be positive, got 0.0"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        projection(**options)


def test_an_unknown_batch_layout_says_what_is_known(tmp_path):
    callback = projection(calibration=[{"pixels": general_inputs()}])
    with pytest.raises(TypeError, match=r"a dict with the keys \['pixels'\]. Pass `batch_to_inputs`"):
        trainer(tmp_path, callback).fit(Net())
    ours = projection(
        calibration=({"pixels": general_inputs()} for _ in range(1)),  # a generator runs once and suffices
        batch_to_inputs=lambda batch: (batch["pixels"], None),
    )
    model = Net()
    trainer(tmp_path, ours).fit(model)
    assert leak(model) <= 1e-6


def test_save_before_fit():
    with pytest.raises(RuntimeError, match="no basis to save yet"):
        projection().save("x.safetensors")
