"""Continual learning: a small network learns digits 0-4, then 5-9, and keeps the first five.

    python examples/continual_vision.py

Task B is learnt twice from the same start: plain fine-tuning, and with NullSpaceProjection calibrated on task A's
images. Each task has a head of its own, the body is shared, and nothing of A is replayed. Runs in seconds on a CPU
(scikit-learn's 8x8 digits, no download).
"""

from __future__ import annotations

import copy
import json

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nspo_lightning.callbacks import NullSpaceProjection

LEARNING_RATE = 5e-3


class Digits(pl.LightningModule):
    """A perceptron without biases, with one head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 256, bias=False), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(256, 10, bias=False) for _ in range(2)])
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the current task, shape ``(batch, 10)``."""
        return self.heads[self.task](self.body(x))

    def learn(self, task: int) -> None:
        """Train the body and this task's head, and no other head."""
        self.task = task
        for number, head in enumerate(self.heads):
            head.requires_grad_(number == task)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what is trained."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)


def accuracy(model: Digits, task: int, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy, in per cent."""
    model.task = task
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def fit(model: Digits, data: TensorDataset, *callbacks: pl.Callback, max_steps: int = -1) -> None:
    """Train for a few epochs, or fewer steps."""
    trainer = pl.Trainer(
        max_epochs=30,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))


def tasks() -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Return images, shape ``(rows, 64)``, and labels by task and split: digits 0-4 and 5-9, ``train`` and ``test``."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    test, first = torch.arange(len(x)) % 5 == 0, y < 5
    return {
        (task, split): (x[mask], y[mask])
        for task, of_task in ((0, first), (1, ~first))
        for split, mask in (("train", of_task & ~test), ("test", of_task & test))
    }


def main() -> dict[str, float]:
    """Train both ways, print and return the accuracies."""
    pl.seed_everything(0, verbose=False)
    sets = tasks()
    model = Digits()
    model.learn(0)
    fit(model, TensorDataset(*sets[0, "train"]))
    result = {"A before B": accuracy(model, 0, *sets[0, "test"])}

    for name in ("plain", "null space"):
        student = copy.deepcopy(model)
        student.learn(1)
        # B's own head moves nothing that A computes: it may train freely, and saying so is all that it takes.
        projection = NullSpaceProjection(
            [sets[0, "train"]],
            criterion="energy",
            threshold=1e-3,
            target_modules=["body"],
            unprotected="warn",
            cache_dir=None,
        )
        fit(student, TensorDataset(*sets[1, "train"]), *([projection] if name == "null space" else []))
        result[f"A after B, {name}"] = accuracy(student, 0, *sets[0, "test"])
        result[f"B, {name}"] = accuracy(student, 1, *sets[1, "test"])
    print(json.dumps({key: round(value, 1) for key, value in result.items()}))
    return result


if __name__ == "__main__":
    main()
