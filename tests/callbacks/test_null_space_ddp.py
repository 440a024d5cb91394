"""DDP on two gloo processes: both ranks hold, agree with each other, and agree with one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from null_space_problems import PROTECTED, Net, trainer

from nspo_lightning.callbacks import NullSpaceProjection

LEAK = 1e-6


@pytest.mark.timeout(280)
def test_two_processes_agree_with_one(tmp_path):
    script = Path(__file__).with_name("null_space_ddp_job.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"))}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
        env=environment | {"PYTHONPATH": str(script.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = Net()
    trainer(tmp_path, NullSpaceProjection(criterion="rank", threshold=PROTECTED, cache_dir=None)).fit(alone)
    for rank in ranks:
        assert rank["leak"] <= LEAK
        assert max(rank["certificate"].values()) <= LEAK
        assert rank["cached"] == ranks[0]["cached"]
        for name, value in rank["weights"].items():
            assert torch.equal(value, ranks[0]["weights"][name])
            assert torch.allclose(value, alone.state_dict()[name], rtol=1e-3, atol=1e-5), name
