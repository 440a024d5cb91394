"""Train the small problem under ModelParallelStrategy (FSDP2) on two CPU processes; each rank writes what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from null_space_ddp_job import Dealt
from null_space_problems import PROTECTED, trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nspo_lightning.callbacks import NullSpaceProjection


class Sharded(Dealt):
    """Each adapted layer's parameters are split by rows over the ranks, as FSDP2 does it."""

    def configure_model(self) -> None:
        """Shard once."""
        if isinstance(self.first.down.weight, DTensor):
            return
        for layer in (self.first, self.second):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run a forward without a backward before training: FSDP2 leaves gathered weights behind."""
        self.training_step(batch, batch_idx)

    def val_dataloader(self) -> Any:
        """Yield training rows."""
        return self.train_dataloader()


def main(folder: Path) -> None:
    """Run; the batch of 4 on each of two ranks is one batch of 8."""
    torch.set_num_threads(1)
    model = Sharded()
    callback = NullSpaceProjection(criterion="rank", threshold=PROTECTED, cache_dir=None)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = {"num_sanity_val_steps": 1, "limit_val_batches": 1, "use_distributed_sampler": False}
    trainer(folder, callback, strategy=strategy, devices=2, **options).fit(model)
    local = model.first.down.weight
    assert isinstance(local, DTensor)
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    result = {
        "local_rows": local.to_local().shape[0],
        "certificate": callback.certificate(),
        "weights": {k: v.detach() for k, v in whole.items()},
    }
    torch.save(result, folder / f"rank{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
