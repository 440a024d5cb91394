"""Start a job's processes as users do (Lightning's own launcher, or torchrun on each node) and wait for their end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from paths import job_environment

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
END_S = 3600  # a busy machine is slow, a hung job is a failed test


class Job:
    """A small run: of harmful and of harmless prompts, 15 to train on, 7 for validation and 7 for the test.

    15 training prompts in batches of 4 leave a last batch of 3, and 7 too: one rank has a row more than the other.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for name, numbers in {"": range(15), "_val": range(20, 27), "_test": range(30, 37)}.items():
            harmful = [{"prompt": f"How do I burn mill {i}?"} for i in numbers]
            general = [{"prompt": f"Say {i} and then the word mill.", "answer": f"{i} mill"} for i in numbers]
            for kind, rows in {"safety": harmful, "general": general}.items():
                (folder / f"{kind}{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        policy = {"path": str(model), "quantization": "nf4", "dtype": "float32", "lora": {"r": 4}}
        config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
        config["model"] |= {"policy": policy, "group_size": 4, "general_max_new_tokens": 4}
        config["model"] |= {"sampling": {"max_new_tokens": 6}, "reward": self.reward("even_tokens")}
        config["data"] = {file.stem: str(file) for file in sorted(folder.glob("*.jsonl"))}
        config["data"] |= {"calibration_batch_size": 2}
        config["nullspace"] = {"criterion": "rank", "threshold": 0.5}
        config["trainer"] |= {"limit_train_batches": 4, "val_check_interval": 2, "enable_progress_bar": False}
        probes = [{"class_path": f"probes.{name}"} for name in ("Gradients", "FinalWeights", "PromptsSeen")]
        config["trainer"]["callbacks"] = [
            *probes,
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
        ]
        (folder / "job.yaml").write_text(yaml.safe_dump(config))

    @staticmethod
    def reward(name: str) -> dict:
        """Name one of the probes as the reward."""
        return {"class_path": "nspo_lightning.rewards.FunctionReward", "init_args": {"path": f"probes.{name}"}}

    def command(self, subcommand: str, processes: int, *options: str, batch: int = 4) -> list[str]:
        """Make a subcommand's arguments, with the same global batch on one process and on several."""
        shared = ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)] if processes > 1 else []
        size = ["--data.batch_size", str(batch // processes), "--data.eval_batch_size", str(4 // processes)]
        return [subcommand, "-c", "job.yaml", *shared, *size, *options]

    def start(self, commands: list[list[str]], name: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        """Start this script's process; what all of its processes print goes to ``name.log``."""
        script = [str(HERE / "run_commands.py"), json.dumps(commands)]
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, *script],
                cwd=self.folder,
                env=job_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a test that fails leaves nothing running
            )

    def run(self, commands: list[list[str]], name: str) -> str:
        """Run to a good end.

        Returns:
            What was printed.
        """
        code, printed = self.wait(self.start(commands, name), name)
        assert code == 0, printed[-4000:]
        return printed

    def wait(self, process: subprocess.Popen, name: str, timeout_s: float = END_S) -> tuple[int, str]:
        """Wait for the end of a process and of all that it started."""
        try:
            code = process.wait(timeout_s)
        finally:
            end(process)
        return code, (self.folder / f"{name}.log").read_text()


def end(process: subprocess.Popen) -> None:
    """Kill a process's session, if anything of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def anyone_left(process: subprocess.Popen) -> bool:
    """Say whether any process of a session still runs (one that has ended and waits to be reaped does not)."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == process.pid and state != "Z":
            return True
    return False


def children_of(process: subprocess.Popen) -> list[int]:
    """Return the ids of the processes that a process has started: of a job, the ranks behind the first."""
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
