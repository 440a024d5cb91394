"""A run whose learning rate is far too high stays within its budget, goes back to good states, and resumes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nspo_lightning.callbacks import CapabilityGuard
from nspo_lightning.callbacks.guard.budget import Budget, Measurement

BUDGET = 0.05
UPDATES = 30


class Adapted(pl.LightningModule):
    """A frozen linear classifier and a trained addition; training pulls all classes to class 0."""

    def __init__(self, lr=1.0, scheduler=False):
        super().__init__()
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.delta = nn.Linear(6, 4)
        nn.init.zeros_(self.delta.weight)
        nn.init.zeros_(self.delta.bias)
        self.on, self.lr, self.scheduler = True, lr, scheduler
        self.automatic_optimization = True

    def forward(self, x):
        return self.base(x) + (self.delta(x) if self.on else 0)

    @contextmanager
    def disable_adapter(self):
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), torch.zeros(len(batch[0]), dtype=torch.long))

    def validation_step(self, batch, batch_idx):
        probability = self(batch[0]).softmax(-1)[:, 0].mean()
        self.log("safety/unsafe_rate", 1 - probability)
        self.log("general/accuracy", 1 - probability)
        self.log("goal", probability)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.delta.parameters(), lr=self.lr)
        if not self.scheduler:
            return optimizer
        chosen = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": chosen, "interval": "step"}}


def data(seed=0):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size=8)


def logits(module, batch):
    return module(batch[0])


def divergence(module):
    (x,) = data(9).dataset.tensors
    with torch.no_grad():
        log_q = module(x).log_softmax(-1)
        with module.disable_adapter():
            log_p = module(x).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def guard(**changes: Any) -> CapabilityGuard:
    settings: dict[str, Any] = {"max_kl": BUDGET, "text": data(9), "logits": logits, "every_n_updates": 2}
    return CapabilityGuard(**(settings | changes))


def fit(module, *callbacks, folder=None, ckpt_path=None, **options):
    options = {"max_steps": UPDATES, "limit_val_batches": 0} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    validation = None if options["limit_val_batches"] == 0 else data(5)
    trainer.fit(module, data(), validation, ckpt_path=ckpt_path)
    return trainer


def test_without_a_guard_the_budget_is_broken_and_with_it_kept():
    plain, guarded, watcher = Adapted(), Adapted(), guard(max_rescues=UPDATES)
    guarded.load_state_dict(plain.state_dict())
    fit(plain)
    trainer = fit(guarded, watcher)
    assert divergence(plain) > 10 * BUDGET
    assert 0 < divergence(guarded) <= BUDGET
    assert trainer.global_step == UPDATES
    assert watcher.rescues > 0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**watcher.rescues)
    measured = divergence(guarded)
    assert watcher.readings[-1].kl == pytest.approx(measured, rel=1e-4) or watcher.readings[-1].over


class Recorder(Callback):
    """Weights and moments after each batch, behind the guard."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moments = trainer.optimizers[0].state_dict()["state"].get(0, {}).get("exp_avg", torch.zeros(4, 6))
        self.states.append((trainer.global_step, pl_module.delta.weight.detach().clone(), moments.clone()))


def test_it_goes_back_to_the_very_weights_and_moments_of_the_last_good_measurement():
    watcher, recorder = guard(), Recorder()
    fit(Adapted(lr=0.05), watcher, recorder)
    at = {step: (weight, moments) for step, weight, moments in recorder.states}
    good = 0
    rescued = False
    for reading in (r for r in watcher.readings if r.step > 0):
        if reading.over:
            rescued = True
            if good:
                assert torch.equal(at[reading.step][0], at[good][0])
                assert torch.equal(at[reading.step][1], at[good][1])
        else:
            good = reading.step
    assert rescued
    assert good


def test_stop_ends_within_the_budget():
    module, watcher = Adapted(), guard(action="stop")
    trainer = fit(module, watcher)
    assert trainer.global_step < UPDATES
    assert divergence(module) <= BUDGET
    assert watcher.rescues == 0


def test_rescues_are_limited():
    module, watcher = Adapted(lr=1e6), guard(max_rescues=3)
    trainer = fit(module, watcher)
    assert (watcher.rescues, trainer.global_step) == (3, 8)
    assert divergence(module) <= BUDGET


def test_weights_that_are_not_numbers_are_over_budget():
    module, watcher = Adapted(lr=float("inf")), guard(action="stop")
    fit(module, watcher)
    assert watcher.readings[-1].over
    assert module.delta.weight.isfinite().all()


def test_schedulers_go_on_from_the_halved_rate():
    module, watcher = Adapted(scheduler=True), guard(every_n_updates=1)
    trainer = fit(module, watcher, max_steps=10)
    assert watcher.rescues > 0
    expected = 0.5**watcher.rescues / (1 + 10)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_the_best_checkpoint_is_the_safest_within_the_budget(tmp_path):
    module, watcher = Adapted(lr=0.1), guard(every_n_updates=1000)
    best = ModelCheckpoint(dirpath=tmp_path, monitor="guard/score", mode="min", filename="best-{step}")
    fit(module, watcher, best, folder=tmp_path, limit_val_batches=1.0, val_check_interval=1, max_steps=12)
    assert any(r.over for r in watcher.readings)
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert 0 < divergence(module) <= BUDGET
    assert best.best_model_score is not None
    assert 0 < float(best.best_model_score) < 1


def test_a_goal_reached_over_budget_does_not_end_the_run():
    goal: dict[str, Any] = {"monitor": "goal", "mode": "max", "stopping_threshold": 0.5, "patience": 1000}
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "max_steps": 12}
    assert fit(Adapted(lr=5.0), EarlyStopping(**goal), **options).global_step < 12
    watcher = guard(every_n_updates=1000)
    assert fit(Adapted(lr=5.0), EarlyStopping(**goal), watcher, **options).global_step == 12
    assert watcher.rescues > 0


class AfterValidation(Callback):
    def __init__(self):
        self.weights = {}

    def on_validation_end(self, trainer, pl_module):
        self.weights[trainer.global_step] = pl_module.delta.weight.detach().clone()


def test_accuracy_has_a_budget_of_its_own():
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "max_steps": 12}
    module, watcher, after = Adapted(lr=0.03), guard(max_kl=10.0, max_accuracy_drop=0.05), AfterValidation()
    trainer = fit(module, watcher, after, **options)
    assert watcher.rescues > 0
    good = 0
    for reading in (r for r in watcher.readings if r.accuracy_drop is not None):
        if reading.over:  # back to a validated state, though the KL at this very step was within its budget
            assert good
            assert torch.equal(after.weights[reading.step], after.weights[good])
        else:
            good = reading.step
    assert "guard/accuracy_drop" in trainer.callback_metrics
    with pytest.raises(MisconfigurationException, match="logged no `missing`"):
        fit(Adapted(), guard(max_accuracy_drop=0.05, accuracy_metric="missing"), **options)
    with pytest.raises(MisconfigurationException, match="there is none"):
        fit(Adapted(), guard(max_accuracy_drop=0.05))


@pytest.mark.parametrize(
    ("found", "cure"),
    [
        ({"general/refusal_rate": 0.0, "general/unscored/alpaca": 1.0}, "free text cannot be compared"),
        ({"general/truncated": 1.0, "general/truncated/sums": 1.0}, "raise `general_max_new_tokens`"),
    ],
    ids=["free text", "cut thoughts"],
)
def test_without_an_answer_to_compare_there_is_no_accuracy_to_keep_and_that_is_said_before_training(found, cure):
    class Writes(Adapted):
        def evaluate(self, dataloaders):
            return found

        def save_adapter(self, folder):
            raise AssertionError

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        def on_train_batch_start(self, batch, batch_idx):
            raise AssertionError("training began")

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return data()

        def val_dataloader(self):
            return [data(), data()]

    trainer = pl.Trainer(callbacks=[guard(max_accuracy_drop=0.05)], logger=False, max_steps=2, num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match=rf"general/accuracy(.|\n)*{cure}"):
        trainer.fit(Writes(), Data())


def test_a_resumed_run_is_the_same_run(tmp_path):
    start = Adapted(lr=0.3).state_dict()

    def run(steps, ckpt_path=None):
        module, watcher = Adapted(lr=0.3), guard()
        module.load_state_dict(start)
        keep = ModelCheckpoint(dirpath=tmp_path / str(steps), every_n_train_steps=1, save_top_k=-1, save_last=True)
        fit(module, watcher, keep, folder=tmp_path, max_steps=steps, ckpt_path=ckpt_path)
        return module, watcher, keep

    whole, whole_guard, _ = run(12)
    _, first_guard, keep = run(6)
    resumed, resumed_guard, _ = run(12, keep.last_model_path)
    assert first_guard.rescues > 0
    assert torch.equal(whole.delta.weight, resumed.delta.weight)
    assert (whole_guard.rescues, whole_guard.lr_scale) == (resumed_guard.rescues, resumed_guard.lr_scale)


def test_mistakes_are_told_before_training():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_kl": None}, "no budget"),
        ({"max_kl": -1.0}, "positive"),
        ({"max_accuracy_drop": 1.5}, "share"),
        ({"max_refusal_rise": 2.0}, "`max_refusal_rise` is a share"),
        ({"action": "pray"}, "'halve' or 'stop'"),
        ({"every_n_updates": 0}, "at least 1"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            guard(**changes)
    wrong = [
        ({"logits": None}, "text_scores"),
        ({"text": None}, "no text"),
        ({"text": []}, "is empty"),
        ({"max_kl_first": 0.1}, "no prompts with answers"),
        ({"logits": lambda m, b: m(b[0]) * torch.nan}, "not a number"),
    ]
    for changes, message in wrong:
        with pytest.raises(MisconfigurationException, match=message):
            fit(Adapted(), guard(**changes))
    moved = Adapted()
    nn.init.normal_(moved.delta.weight, std=3.0)
    with pytest.raises(MisconfigurationException, match="starts over budget"):
        fit(moved, guard())


def test_a_drop_of_exactly_the_budget_is_within_it_though_rates_are_logged_in_float32():
    budget = Budget(max_accuracy_drop=0.05, max_refusal_rise=0.1)
    drop, rise = 0.95 - float(torch.tensor(0.9)), float(torch.tensor(0.1))
    assert drop > 0.05 + 1e-9
    at_most = Measurement(step=1, kl=0.0, accuracy_drop=drop, refusal_rise=rise)
    assert budget.over(at_most, "accuracy", "refused") == ""
    more = Measurement(step=1, kl=0.0, accuracy_drop=0.0501, refusal_rise=rise)
    assert budget.over(more, "accuracy", "refused") == "accuracy 5.0 points below the base"
