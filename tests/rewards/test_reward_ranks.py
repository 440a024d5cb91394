"""A reward that hangs or raises on one of two ranks ends both with the same error."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

WORKER = """
import datetime, sys, time
import torch.distributed as dist
from nspo_lightning.rewards import RewardError, RewardSet

rank, kind, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))

def reward(completions, **kwargs):
    if rank == 1 and kind == "hangs" and completions[0] == "bad":
        time.sleep(600)
    if rank == 1 and kind == "raises" and completions[0] == "bad":
        raise KeyError("missing column")
    if rank == 1 and kind == "returns nan" and completions[0] == "bad":
        return [float("nan")]
    return [float(rank)]

rewards = RewardSet([reward], timeout_s=1.0)
print("first", rewards(["p"], ["good"]).total.tolist(), flush=True)
try:
    rewards(["p"], ["bad"])
    print("nothing raised", flush=True)
except RewardError as error:
    print("error", " ".join(str(error).splitlines()), flush=True)  # with the last frames of its traceback
print("after", rewards(["p"], ["good"]).total.tolist(), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hangs", "Reward 'reward' took longer than `timeout_s` = 1 s"),
        ("raises", "Reward 'reward' raised KeyError"),
        ("returns nan", "Reward 'reward' returned nan for sample 0"),
    ],
)
def test_both_ranks_raise_the_same_error(tmp_path, kind, expected):
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), kind, str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    lines = [out.splitlines() for out, _ in outputs]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert [found[0] for found in lines] == ["first [0.0]", "first [1.0]"]
    assert lines[0][1] == lines[1][1]  # word for word the same on both
    assert lines[0][1].startswith(f"error On rank 1 (of 2; 1 failed, all stop together): {expected}")
    assert [found[2] for found in lines] == ["after [0.0]", "after [1.0]"]
    assert time.perf_counter() - start < 50  # not the process group's timeout
