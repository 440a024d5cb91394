"""DDP and FSDP2 on two gloo processes: both ranks hold, agree with each other, and agree with one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from null_space_problems import PROTECTED, Net, leak, trainer
from paths import job_environment

from nspo_lightning.callbacks import NullSpaceProjection

LEAK = 1e-6


def two_ranks(job: str, folder: Path) -> list[dict]:
    """Run a job script, which starts its second process itself, and return what each rank wrote."""
    script = Path(__file__).with_name(job)
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
        env=job_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def alone(folder: Path) -> Net:
    """Return the model that a single process trains on the same batches."""
    model = Net()
    trainer(folder, NullSpaceProjection(criterion="rank", threshold=PROTECTED, cache_dir=None)).fit(model)
    return model


@pytest.mark.timeout(280)
def test_two_processes_agree_with_one(tmp_path):
    ranks = two_ranks("null_space_ddp_job.py", tmp_path)
    one = alone(tmp_path).state_dict()
    for rank in ranks:
        assert rank["leak"] <= LEAK
        assert max(rank["certificate"].values()) <= LEAK
        assert rank["cached"] == ranks[0]["cached"]
        for name, value in rank["weights"].items():
            assert torch.equal(value, ranks[0]["weights"][name])
            assert torch.allclose(value, one[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.timeout(280)
def test_rows_sharded_by_model_parallel_strategy_are_held_like_whole_ones(tmp_path):
    ranks = two_ranks("null_space_fsdp_job.py", tmp_path)
    one = alone(tmp_path).state_dict()
    assert [rank["local_rows"] for rank in ranks] == [2, 2]  # 4 rows of A, two on each rank
    for rank in ranks:
        model = Net()
        model.load_state_dict(rank["weights"])
        assert leak(model) <= LEAK
        assert max(rank["certificate"].values()) <= LEAK
        for name, value in rank["weights"].items():
            assert torch.equal(value, ranks[0]["weights"][name])
            assert torch.allclose(value, one[name], rtol=1e-3, atol=1e-5), name
