"""The shipped strategies, laid over a run's configuration: what runs, what is refused, and that files say which."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta
from importlib.util import find_spec

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from processes import CONFIGS

from nspo_lightning.callbacks import EndTogether
from nspo_lightning.cli.jobs import CLI, cli_arguments
from nspo_lightning.module.start_checks import check_strategy

SHIPPED = sorted((CONFIGS / "strategies").glob("*.yaml"))


@pytest.fixture
def instantiate(monkeypatch, tmp_path):
    """Lay a strategy over the quickstart, on two CPU processes."""
    monkeypatch.chdir(tmp_path)
    base = ["-c", str(CONFIGS / "quickstart.yaml")]

    def build(name, *options, devices=2):
        laid = ["-c", str(CONFIGS / "strategies" / f"{name}.yaml")] if name else []
        cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices)]
        return CLI(**cli_arguments(), run=False, args=[*base, *laid, *cpu, *options])

    return build


def test_ddp(instantiate):
    strategy = instantiate("ddp").trainer.strategy
    assert type(strategy) is DDPStrategy
    assert strategy._timeout == timedelta(minutes=30)
    assert strategy.num_processes == 2


def test_fsdp2_is_refused_with_the_way_out(instantiate):
    cli = instantiate("fsdp2")
    assert type(cli.trainer.strategy) is ModelParallelStrategy
    with pytest.raises(MisconfigurationException, match=r"shards the policy's weights.*trainer.strategy: ddp"):
        check_strategy(cli.trainer, cli.model.reward)


def test_deepspeed_comes_without_the_projection(instantiate):
    laid = yaml.safe_load((CONFIGS / "strategies" / "deepspeed-zero2.yaml").read_text())
    assert laid["nullspace"] == {"enabled": False}
    assert laid["trainer"]["strategy"]["init_args"]["stage"] == 2
    if find_spec("deepspeed") is None:
        with pytest.raises(ValueError, match="pip install -U deepspeed"):
            instantiate("deepspeed-zero2")


def test_slurm_leaves_requeueing_to_the_script(instantiate, monkeypatch):
    for name, value in {"JOB_ID": "4242", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environment = instantiate("slurm", devices=1).trainer._accelerator_connector.cluster_environment
    assert type(environment).__name__ == "SLURMEnvironment"
    assert environment.auto_requeue is False


@pytest.mark.parametrize("file", [*SHIPPED, CONFIGS / "slurm.sh"], ids=lambda file: file.name)
def test_each_file_says_what_was_not_run(file):
    assert "untested" in file.read_text().lower()


def test_the_slurm_script_is_a_script():
    assert subprocess.run(["bash", "-n", str(CONFIGS / "slurm.sh")], check=False).returncode == 0


def test_a_reward_that_may_outlast_the_others_patience_is_refused(instantiate):
    cli = instantiate("ddp", "--trainer.strategy.init_args.timeout", "0:05:00")
    with pytest.raises(MisconfigurationException, match=r"timeout_s` = 300 s.*timeout of 300 s.*Raise the `timeout`"):
        check_strategy(cli.trainer, cli.model.reward)
    cli.trainer.strategy._timeout = timedelta(minutes=6)
    check_strategy(cli.trainer, cli.model.reward)
    cli.model.reward.timeout_s = None
    with pytest.raises(MisconfigurationException, match="for ever|without end"):
        check_strategy(cli.trainer, cli.model.reward)


def test_processes_that_wait_for_ever_are_ended(instantiate):
    trainer = instantiate("ddp").trainer
    waiting = subprocess.Popen(["sleep", "600"])
    trainer.strategy._configure_launcher()
    trainer.strategy.launcher.procs.append(waiting)
    try:
        EndTogether(grace_s=0.2).on_exception(trainer, LightningModule(), RuntimeError())
        assert waiting.wait(10) == -9
        assert trainer.strategy.launcher.procs == []
    finally:
        if waiting.poll() is None:
            os.kill(waiting.pid, 9)
