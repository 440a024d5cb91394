"""A run holds after many updates what it held after a few: file handles, threads, tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from held import Held, Watch, slope
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_jobs import WORDS, even_tokens, harmful

from nspo_lightning.callbacks import ExactResume, LastOnException, SampleCompletions
from nspo_lightning.checkpoints import AtomicCheckpointIO
from nspo_lightning.cli.trainer import Trainer
from nspo_lightning.datamodules import AlignmentDataModule, PromptSource
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rollout import SamplingConfig

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


def general(split):
    return [{"prompt": f"Say {word}.", "answer": word} for word in WORDS]


def test_thirty_updates_leave_nothing_behind(tiny_llama: Path, tmp_path: Path) -> None:
    policy = GRPOModule(
        even_tokens,
        policy=PolicySettings(path=str(tiny_llama), quantization="none", dtype="float32", lora=LoraSettings(r=4)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        group_size=4,
        sampling=SamplingConfig(max_new_tokens=4),
        general_max_new_tokens=2,
    )
    watch = Watch()
    Watch.seen = []
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=30,
        val_check_interval=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(tmp_path, name="soak", version=""),
        accelerator="cpu",
        log_every_n_steps=1,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            watch,
            ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_last=True),
            ExactResume(),
            LastOnException(),
            SampleCompletions(every_n_steps=1),
        ],
    )
    data = AlignmentDataModule(
        PromptSource(rows=harmful), PromptSource(rows=general), batch_size=2, val_size=2, test_size=2
    )
    trainer.fit(policy, data)
    settled = watch.seen[9:]
    assert len(watch.seen) == 30
    assert {one.handles for one in settled} == {settled[0].handles}
    assert {one.threads for one in settled} == {settled[0].threads}
    tensors = [one.tensors for one in settled if one.tensors >= 0]
    assert len(tensors) == 3
    assert max(tensors) - min(tensors) <= 8  # a few are on their way


def test_a_line_is_fitted_through_the_second_half() -> None:
    seen = [Held(i, memory_mb=100.0 + max(i - 10, 0) * 0.5, handles=3, threads=4) for i in range(20)]
    assert slope(seen, "memory_mb") == pytest.approx(0.5)
    assert slope(seen, "handles") == pytest.approx(0.0)
