"""Rewards under a real Trainer: a judge that stays down leaves a checkpoint, a hanging rank ends both."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from test_server_judge import items, judge, running

from nspo_lightning.callbacks import LastOnException
from nspo_lightning.rewards import OutcomeReward, RewardError, RewardSet


class JudgedModel(BoringModel):
    def __init__(self, rewards, failing_step=None):
        super().__init__()
        self.rewards, self.failing_step, self.judged_steps = rewards, failing_step, []

    def training_step(self, batch, batch_idx):
        text = f"item {items(1)[0]}"
        if self.global_step == self.failing_step:
            text += " faults 500,always"
        result = self.rewards(["q"], [text])
        self.judged_steps.append(self.global_step)
        self.log_dict(result.metrics)
        output = super().training_step(batch, batch_idx)
        assert isinstance(output, dict)
        return output["loss"] * (1.0 + result.total.nansum())


def trainer(folder, **options):
    return pl.Trainer(
        default_root_dir=folder, max_steps=5, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath=folder / "ckpt", save_last=True), LastOnException()], **options,
    )  # fmt: skip


def test_judge_that_stays_down_stops_the_run_with_a_checkpoint_that_resumes(tmp_path):
    with running() as url:
        rewards = RewardSet([OutcomeReward(judge(url, max_retries=1, name="j"))])
        broken = JudgedModel(rewards, failing_step=3)
        with pytest.raises(RewardError, match="Judge 'j' .* failed: status 500"):
            trainer(tmp_path).fit(broken)
        assert broken.judged_steps == [0, 1, 2]
        healthy = JudgedModel(rewards)
        resumed = trainer(tmp_path)
        resumed.fit(healthy, ckpt_path="last")
        assert healthy.judged_steps == [3, 4]  # goes on where it stopped
        assert resumed.global_step == 5
        assert resumed.callback_metrics["judge/safety/errors"] == 1


def test_excluding_judge_lets_the_run_go_on_and_counts(tmp_path):
    with running() as url:
        rewards = RewardSet([OutcomeReward(judge(url, max_retries=1, on_error="exclude"))])
        model = JudgedModel(rewards, failing_step=3)
        run = trainer(tmp_path)
        run.fit(model)
    assert model.judged_steps == [0, 1, 2, 3, 4]
    assert run.callback_metrics["judge/safety/excluded"] == 1


DDP = """
import sys, time
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from nspo_lightning.rewards import RewardError, RewardSet

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        def reward(completions, **columns):
            if self.global_rank == 1 and batch_idx == 2:
                if sys.argv[1] == "hangs":
                    time.sleep(600)
                raise KeyError("answer")
            return [1.0]
        RewardSet([reward], timeout_s=2.0)(["q"], ["c"])
        return super().training_step(batch, batch_idx)

trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=6, limit_val_batches=0, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                     use_distributed_sampler=False)
try:
    trainer.fit(Model())
except RewardError as error:
    with open(f"rank{trainer.global_rank}.txt", "w") as file:
        file.write(f"step {trainer.global_step}: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "problem"), [("hangs", "took longer than"), ("raises", "raised KeyError")])
def test_a_reward_failing_on_one_ddp_rank_ends_both(tmp_path, kind, problem):
    script = tmp_path / "run.py"
    script.write_text(DDP)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), kind],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert time.perf_counter() - start < 200
    said = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1], done.stderr
    assert said[0].startswith(f"step 2: On rank 1 (of 2; 1 failed, all stop together): Reward 'reward' {problem}")
