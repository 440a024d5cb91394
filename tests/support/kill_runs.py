"""A small run in a forked process that is killed in a chosen phase, and a comparison of what runs left, bit by bit.

Runs are forked from this process, which has imported everything: one then takes seconds. The job is small but has all
that could go wrong: dropout, rewards that use Python's and NumPy's generators, a schedule, four updates a rollout,
validations that fall between them, early stopping, the best two checkpoints, two epochs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from forked import end_with, log_to_stderr
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from workspace import write_lines

from nspo_lightning.cli.app import main

PHASES = ("calibration", "rollout", "between updates", "checkpoint", "validation")
MARKS = "phases.log"
UPDATES_A_ROLLOUT = 4  # two passes over two minibatches


def noisy_reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Score the share of even token ids, with noise from the generators that a reward may use.

    Args:
        prompts: One a completion.
        completions: The texts.
        completion_ids: Their tokens.

    Returns:
        One number a completion.
    """
    noise = [0.05 * (random.random() + float(np.random.rand())) for _ in completions]
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) + n for ids, n in zip(completion_ids, noise, strict=True)]


def some_alike(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Score as `noisy_reward` does, and all answers to two prompts of three alike.

    Args:
        prompts: One a completion.
        completions: The texts.
        completion_ids: Their tokens.

    Returns:
        One number a completion.
    """
    scores = noisy_reward(prompts, completions, completion_ids)
    number = [int(prompt.rstrip("?").split()[-1]) for prompt in prompts]
    return [0.0 if n % 3 else score for n, score in zip(number, scores, strict=True)]


class Marks(Callback):
    """Append the phase that begins to a file, for the process that kills."""

    def __init__(self) -> None:
        self._file = os.open(MARKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        fsync = os.fsync

        def slow_fsync(fd: Any) -> None:
            if "checkpoints" in os.readlink(f"/proc/self/fd/{fd}"):  # other files of a run are written so too
                self.mark("checkpoint")
            time.sleep(0.02)  # or nobody would ever be quick enough to kill it there
            fsync(fd)

        os.fsync = slow_fsync

    def mark(self, phase: str) -> None:
        """Write a line.

        Args:
            phase: What begins.
        """
        os.write(self._file, f"{phase}\n".encode())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark: what follows is calibration (or its cache), and measuring."""
        self.mark("calibration")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark: a rollout, or the next update of one."""
        self.mark("between updates" if batch_idx % UPDATES_A_ROLLOUT else "rollout")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark."""
        self.mark("validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark."""
        self.mark("end")


WARMUP = {
    "refusal_share": 1.0,
    "max_updates": 12,
    "batch_size": 4,
    "check_every": 3,
    "check_prompts": 4,
    "lr": 0.02,
    "max_general_refusals": 1.0,
}
"""A warm start of the small job. Whether it comes to an end that is an error is not what is compared."""


def write_job(folder: Path, accumulate: int = 1, *, dynamic: bool = False, guided: bool = False) -> None:
    """Write data and configuration of the small job.

    Args:
        folder: Where to.
        accumulate: Batches an update.
        dynamic: Whether groups without a signal, of which there are many then, are replaced.
        guided: Whether a part of each group is drawn under a safety prompt.
    """
    folder.mkdir(parents=True)
    write_lines(folder / "safety.jsonl", [{"prompt": f"How do I burn mill {i}?"} for i in range(28)])
    write_lines(folder / "general.jsonl", [{"prompt": f"Say {i}.", "answer": f"{i}"} for i in range(28)])
    callbacks = "lightning.pytorch.callbacks."
    config = {
        "name": "job",
        "seed_everything": 3,
        "model": {
            "reward": {
                "class_path": "nspo_lightning.rewards.FunctionReward",
                "init_args": {"path": "kill_runs.some_alike" if dynamic else "kill_runs.noisy_reward"},
            },
            "policy": {
                "path": "toy",
                "quantization": "none",
                "dtype": "float32",
                "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 40}},
            "group_size": 4,
            "num_iterations": 2,
            "num_minibatches": 2,
            "dynamic_sampling": {"max_factor": 3} if dynamic else None,
            "guided": {"share": 0.25} if guided else None,
            "sampling": {"max_new_tokens": 8},
            "general_max_new_tokens": 4,
        },
        "data": {
            "safety": "safety.jsonl",
            "general": "general.jsonl",
            "batch_size": 4,
            "val_size": 4,
            "test_size": 4,
        },
        "nullspace": {"criterion": "rank", "threshold": 0.5},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 8,
            "accumulate_grad_batches": accumulate,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "kill_runs.Marks"},
                {
                    "class_path": callbacks + "EarlyStopping",
                    "init_args": {"monitor": "reward", "mode": "max", "patience": 100},
                },
                {
                    "class_path": callbacks + "ModelCheckpoint",
                    "init_args": {
                        "monitor": "reward",
                        "mode": "max",
                        "save_top_k": 2,
                        "filename": "best-{step}",
                        "enable_version_counter": False,
                    },
                },
                {
                    "class_path": callbacks + "ModelCheckpoint",
                    "init_args": {
                        "every_n_train_steps": 1,
                        "save_last": True,
                        "filename": "now-{step}",
                        "enable_version_counter": False,
                    },
                },
            ],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def warmup_options() -> list[str]:
    """Return the arguments of ``warmup`` for the small job, which writes a checkpoint after each update."""
    last = "--trainer.callbacks+=nspo_lightning.callbacks.LastCheckpoint"
    own = [f"--warmup.{name}={value}" for name, value in WARMUP.items()]
    return [*own, last, "--trainer.callbacks.every_n_updates=1"]


def start(folder: Path, *arguments: str, before: Callable[[], None] = lambda: None, command: str = "fit") -> int:
    """Fork a run in a folder.

    Args:
        folder: With the job's files; marks and output go there too.
        *arguments: Further ones for the command.
        before: Called in the child before it runs.
        command: The subcommand.

    Returns:
        The child's process id.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child

    def work() -> None:
        os.chdir(folder)
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch's pool does not survive a fork, and new threads ask for it
        output = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        log_to_stderr()
        before()
        main([command, "-c", "config.yaml", *arguments])

    end_with(work)


def wait(child: int) -> int:
    """Wait for a run.

    Args:
        child: Its process id.

    Returns:
        Its exit code, negative if a signal ended it.
    """
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_in(child: int, folder: Path, phase: str, occurrence: int, delay_s: float, number: int = signal.SIGKILL) -> str:
    """Send a signal to a run in a phase.

    Args:
        child: The run.
        folder: Its folder.
        phase: One of `PHASES`.
        occurrence: How often it must have begun, from 1.
        delay_s: How long after that.
        number: The signal.

    Returns:
        The phase that was really hit, "" if the run was over before.
    """
    marks = folder / MARKS
    while not _has_ended(child):  # on a busy machine a phase may be minutes away
        seen = marks.read_text().split("\n")[:-1] if marks.exists() else []
        if seen.count(phase) >= occurrence:
            time.sleep(delay_s)
            seen = marks.read_text().split("\n")[:-1]
            os.kill(child, number)
            return seen[-1]
        if "end" in seen:
            return ""
        time.sleep(0.001)
    if marks.exists() and "end" in marks.read_text().split("\n"):
        return ""
    raise RuntimeError(f"Phase '{phase}' did not come {occurrence} times in {folder}; see {folder / 'output.log'}.")


def _has_ended(child: int) -> bool:
    """Tell whether a run has ended; `wait` still gives its exit code."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def result(folder: Path, name: str = "job") -> dict[str, Any]:
    """Read what a finished run decided.

    Args:
        folder: The job's folder.
        name: The run's.

    Returns:
        The adapter, and of the last checkpoint what decides the future.
    """
    run = folder / "runs" / name
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    seconds = {"seconds"}
    return {
        "adapter": load_file(run / "adapter" / "adapter_model.safetensors"),
        "weights": last["state_dict"],
        "optimizer": last["optimizer_states"],
        "scheduler": last["lr_schedulers"],
        "counters": last["nspo_lightning"]["counters"],
        "generators": last["ExactResume"]["ranks"],
        "loops": last["loops"]["fit_loop"],  # and the place in the data
        "best": _scores(last["callbacks"]),
        "summary": {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k not in seconds},
    }


def _scores(callbacks: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, state in callbacks.items():
        if "EarlyStopping" in key:
            kept[key] = state
        elif "ModelCheckpoint" in key:
            kept[key] = (
                {Path(p).name: s for p, s in state["best_k_models"].items()},
                Path(state["best_model_path"]).name,
            )
    return kept


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """List where two nested values differ in any bit.

    Args:
        first: One.
        second: The other.
        path: Where they stand.

    Returns:
        Paths of what differs.
    """
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.shape == second.shape and torch.equal(first, second) else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(first.keys() | second.keys(), key=str)
        return [d for k in keys for d in differences(first.get(k), second.get(k), f"{path}/{k}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [d for i, (a, b) in enumerate(zip(first, second, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if first == second else [path]


def occurrences(folder: Path) -> Counter[str]:
    """Count the phases of a run.

    Args:
        folder: Its folder.

    Returns:
        How often each began.
    """
    return Counter((folder / MARKS).read_text().split("\n")[:-1])
