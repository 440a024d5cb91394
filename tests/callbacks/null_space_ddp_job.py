"""Train the small problem under DDP on two CPU processes; each rank writes its leak and weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from null_space_problems import PROTECTED, Net, leak, trainer
from torch.utils.data import DataLoader, TensorDataset

from nspo_lightning.callbacks import NullSpaceProjection


class Dealt(Net):
    """Rank r takes every other row, so that two batches of 4 are the single process's batch of 8."""

    def train_dataloader(self) -> DataLoader:
        rows = super().train_dataloader().dataset
        assert isinstance(rows, TensorDataset)
        rows = TensorDataset(*(t[self.global_rank :: 2] for t in rows.tensors))
        return DataLoader(rows, batch_size=4)


def main(folder: Path) -> None:
    """Run; the batch of 4 on each of two ranks is one batch of 8."""
    torch.set_num_threads(1)
    model = Dealt()
    callback = NullSpaceProjection(criterion="rank", threshold=PROTECTED)
    trainer(folder, callback, strategy="ddp", devices=2, use_distributed_sampler=False).fit(model)
    result = {
        "leak": leak(model),
        "certificate": callback.certificate(),
        "weights": {k: v for k, v in model.state_dict().items() if "lora" in k},
        "cached": callback.source.path,
    }
    torch.save(result, folder / f"rank{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
