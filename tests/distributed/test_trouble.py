"""One rank is slow, fails or is told to stop: the other waits, ends too, or stops with it."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from processes import anyone_left, children_of

ENDS_WITHIN_S = 60
"""From an exception on one rank to the end of all processes; docs/scaling.md says so."""
pytestmark = pytest.mark.timeout(1800)


def probe(name, **arguments):
    given = [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    return [f"--trainer.callbacks+=probes.{name}", *given]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_on_one_rank_ends_both_and_is_seen(job, rank):
    process = job.start([job.command("fit", 2, "--name", f"fails-{rank}", *probe("Fails", rank=rank))], "fails")
    code, printed = job.wait(process, "fails")
    took = time.time() - float((job.folder / "failed.txt").read_text())
    assert code != 0
    assert f"RuntimeError: planted on rank {rank}" in printed
    assert took < ENDS_WITHIN_S
    assert not anyone_left(process)


@pytest.mark.slow
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


def test_a_judge_that_fails_on_one_rank_is_one_message_of_both(job):
    fit = job.command("fit", 2, "--name", "judged", "--model.judge", "probes.JudgeThatFails")
    code, printed = job.wait(job.start([fit], "judged"), "judged")
    assert code == 1
    assert printed.count("no verdict") == 1, printed[-3000:]
    assert "On rank 1 (of 2; 1 failed, all stop together): no verdict" in printed


@pytest.mark.slow
def test_a_calibration_that_fails_on_the_first_rank_ends_both(job):
    (job.folder / "taken").mkdir()
    process = job.start([job.command("calibrate", 2, "--out", "taken")], "calibrates")
    code, printed = job.wait(process, "calibrates", timeout_s=ENDS_WITHIN_S)
    assert code == 1
    assert "taken" in printed
    assert not anyone_left(process)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "everyone"), [("SIGTERM", True), ("SIGTERM", False), ("SIGINT", False)])
def test_a_signal_leaves_a_checkpoint_that_goes_on_to_the_same_end(job, number, everyone):
    """SLURM and torchrun tell every rank; a Ctrl-C or an impatient administrator perhaps one."""
    name = f"{number}-{everyone}"
    for mark in job.folder.glob("step-*"):
        mark.unlink()
    job.run([job.command("fit", 2, "--name", "whole")], "whole")
    fit = job.command("fit", 2, "--name", name, *probe("SaysWhere"))
    process = job.start([fit], name)
    deadline = time.time() + 800
    while not all((job.folder / f"step-2-{rank}").exists() for rank in (0, 1)):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    (os.killpg if everyone else os.kill)(process.pid, getattr(signal, number))
    code, printed = job.wait(process, name)
    assert code == (128 + signal.SIGTERM if number == "SIGTERM" else 1), printed[-3000:]
    assert "state saved to" in printed
    job.run([[*fit, "--ckpt_path", "last"]], "goes-on")
    for rank in (0, 1):
        whole, stopped = (torch.load(job.folder / "runs" / run / f"weights-{rank}.pt") for run in ("whole", name))
        assert all(torch.equal(value, stopped[key]) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one", "all"])
def test_a_run_whose_ranks_are_killed_goes_on_to_the_same_end(job, who):
    """Groups are replaced and a part of each is guided; two prompts of three have no signal."""
    options = ["--model.dynamic_sampling.max_factor", "3", "--model.guided.share", "0.25", *probe("SaysWhere")]
    options += ["--model.reward.init_args.path", "kill_runs.some_alike"]

    def fit(name):
        return job.command("fit", 2, "--name", name, *options)

    job.run([fit("undisturbed")], "undisturbed")
    for mark in job.folder.glob("step-*"):
        mark.unlink()
    process = job.start([fit(f"killed-{who}")], f"killed-{who}")
    deadline = time.time() + 800
    while not all((job.folder / f"step-2-{rank}").exists() for rank in (0, 1)):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    if who == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        (second,) = children_of(process)
        os.kill(second, signal.SIGKILL)
    killed = time.time()
    code, printed = job.wait(process, f"killed-{who}", timeout_s=ENDS_WITHIN_S)
    assert code != 0, printed[-3000:]
    assert time.time() - killed < ENDS_WITHIN_S
    assert not anyone_left(process)
    last = job.folder / "runs" / f"killed-{who}" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    job.run([[*fit(f"killed-{who}"), "--ckpt_path", "last"]], "goes-on")
    for rank in (0, 1):
        whole, resumed = (
            torch.load(job.folder / "runs" / run / f"weights-{rank}.pt") for run in ("undisturbed", f"killed-{who}")
        )
        assert any(bool(value.any()) for name, value in whole.items() if "lora_B" in name)
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "saved"),
    [
        pytest.param("scores-8", True, id="guard"),
        pytest.param("passes-2", False, id="calibration"),
        pytest.param("answers-2", False, id="before"),
    ],
)
def test_a_signal_to_one_rank_ends_what_both_measure_within_a_batch(job, mark, saved):
    """Each rank scores three batches at the start, three before training and three after an update."""
    what, at = mark.split("-")
    for old in job.folder.glob("*-*-[01]"):
        old.unlink()
    guard = ["--trainer.callbacks+=nspo_lightning.callbacks.CapabilityGuard", "--trainer.callbacks.max_kl=9"]
    guard += ["--trainer.callbacks.every_n_updates=1"]
    fit = job.command("fit", 2, "--name", f"stops-{what}", *guard, *probe("SaysWhatItDoes"))
    fit += ["--data.eval_batch_size", "1", "--trainer.val_check_interval", "4"]
    process = job.start([fit], f"stops-{what}")
    deadline = time.time() + 800
    while not (job.folder / f"{mark}-1").exists():
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    code, printed = job.wait(process, f"stops-{what}")
    assert code == 128 + signal.SIGTERM, printed[-3000:]
    assert ("state saved to" in printed) == saved
    done = max(int(file.name.split("-")[1]) for file in job.folder.glob(f"{what}-*-[01]"))
    assert done <= int(at) + 2
    if saved:
        job.run([[*fit, "--ckpt_path", "last"]], "goes-on")
