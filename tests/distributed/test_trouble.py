"""One rank is slow, fails or is told to stop: the other waits, ends too, or stops with it."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from processes import anyone_left

ENDS_WITHIN_S = 60
"""From an exception on one rank to the end of all processes; docs/scaling.md says so."""
pytestmark = pytest.mark.timeout(1800)


def probe(name, **arguments):
    given = [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    return [f"--trainer.callbacks+=probes.{name}", *given]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_both_and_is_seen(job, rank):
    process = job.start([job.command("fit", 2, "--name", f"fails-{rank}", *probe("Fails", rank=rank))], "fails")
    code, printed = job.wait(process, "fails")
    took = time.time() - float((job.folder / "failed.txt").read_text())
    assert code != 0
    assert f"RuntimeError: planted on rank {rank}" in printed
    assert took < ENDS_WITHIN_S
    assert not anyone_left(process)


def test_a_slow_rank_is_waited_for_and_the_limit_is_the_strategys(job):
    strategy = ["--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy"]
    late = probe("Sleeps", rank=1, seconds=8.0)
    fit = job.command("fit", 2, "--name", "waits", *late)
    printed = job.run([fit], "waits")
    assert "Traceback" not in printed
    quick = {"rewards": ["probes.even_tokens"], "timeout_s": 1}
    reward = ["--model.reward", json.dumps({"class_path": "nspo_lightning.rewards.RewardSet", "init_args": quick})]
    limit = [*strategy, "--trainer.strategy.timeout", "0:00:03", *reward, "--name", "gives-up"]
    code, printed = job.wait(job.start([[*fit, *limit]], "gives-up"), "gives-up")
    assert code != 0
    assert "imed out" in printed


@pytest.mark.slow
def test_sigterm_to_all_ranks_leaves_a_checkpoint_that_goes_on_to_the_same_end(job):
    job.run([job.command("fit", 2, "--name", "whole")], "whole")
    fit = job.command("fit", 2, "--name", "stopped", *probe("SaysWhere"))
    process = job.start([fit], "stopped")
    deadline = time.time() + 800
    while not all((job.folder / f"step-2-{rank}").exists() for rank in (0, 1)):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM and torchrun do it: to every rank
    code, printed = job.wait(process, "stopped")
    assert code == 128 + signal.SIGTERM, printed[-3000:]
    assert "state saved to" in printed
    job.run([[*fit, "--ckpt_path", "last"]], "goes-on")
    for rank in (0, 1):
        whole, stopped = (
            torch.load(job.folder / "runs" / name / f"weights-{rank}.pt") for name in ("whole", "stopped")
        )
        assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
