"""Modules without a forward: the one model in them is calibrated, or one message says what is missing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from null_space_problems import OUT, WIDTH, LoraLinear, Net, general_inputs, trainer
from tiny_policies import VOCABULARY, tiny_policy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.nullspace.modes import adapters_off

THREE_LINES = r"(?s)def forward.*def to_inputs.*NullSpaceProjection\(\.\.\., batch_to_inputs=to_inputs\)"


def token_batches():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (4, 3), generator=generator)  # fewer tokens than the layers are wide
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


class Tuner(pl.LightningModule):
    """A language model in a module whose training step calls it, as most people write it: no forward."""

    def __init__(self, others: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.model = tiny_policy()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
        for name, other in (others or {}).items():
            self.add_module(name, other)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(input_ids=batch).logits[:, :-1]
        loss: torch.Tensor = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randint(3, VOCABULARY, (8, 5)), batch_size=4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def projection(**kwargs):
    return NullSpaceProjection(**{"criterion": "rank", "threshold": 0.5, "cache_dir": None, **kwargs})


@pytest.mark.parametrize("others", [{}, {"reference": nn.Linear(4, 4).requires_grad_(False), "act": nn.Tanh()}])
def test_the_one_model_that_is_trained_is_calibrated_and_held(tmp_path, others):
    tuner = Tuner(others)
    text = token_batches()
    callback = projection(calibration=text, criterion="energy", threshold=1e-6)
    trainer(tmp_path, callback, max_steps=20).fit(tuner)
    moved = {name: p for name, p in tuner.named_parameters() if "lora_B" in name}
    assert max(float(p.detach().abs().max()) for p in moved.values()) > 1e-3
    assert max(callback.certificate().values()) < 1e-5
    tuner.eval()
    with torch.no_grad():
        now = tuner.model(**text[0]).logits
        with adapters_off(tuner):
            before = tuner.model(**text[0]).logits
    assert float((now - before).abs().max()) < 1e-2 * float(before.abs().max())
    assert callback.output_change is not None
    assert callback.output_change < 1e-2


class TwoTrained(Tuner):
    def __init__(self) -> None:
        super().__init__({"other": LoraLinear(WIDTH, OUT)})


class HeadOnFrozen(pl.LightningModule):
    """What is trained reads what another model gives, in the same shape as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH).requires_grad_(False), LoraLinear(WIDTH, OUT)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.head(self.body(batch)).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader:
        return DataLoader(general_inputs(), batch_size=8)  # type: ignore[arg-type]

    configure_optimizers = Tuner.configure_optimizers


@pytest.mark.parametrize(
    ("module", "text"), [(TwoTrained, token_batches()), (HeadOnFrozen, [general_inputs()])], ids=["two", "head"]
)
def test_where_it_is_ambiguous_a_message_shows_what_to_write(tmp_path, module, text):
    with pytest.raises(
        MisconfigurationException, match=r"has no `forward`, and 2 models in it.*`batch_to_inputs`"
    ) as said:
        trainer(tmp_path, projection(calibration=text), max_steps=1).fit(module())
    said.match(THREE_LINES)


def test_arguments_that_forward_does_not_take_are_named(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"Net.forward can't be called.*input_ids, attention_mask"
    ) as said:
        trainer(tmp_path, projection(calibration=token_batches()), max_steps=1).fit(Net())
    said.match(THREE_LINES)
    batches = [{"input_ids": general_inputs(), "label": 1}]
    callback = projection(calibration=batches, batch_to_inputs=lambda batch: (batch["input_ids"], None))
    trainer(tmp_path, callback, max_steps=1).fit(Net())
    assert max(callback.certificate().values()) < 1e-5
