"""Share of the projections in real GRPO fits: the quickstart's settings, and a random model of 27 M parameters.

Used by ``projection.py``. The callback's keeper is timed from outside, by wrapping its methods while a fit runs; the
rest of a step (rollout, rewards, scoring, backward, optimizer) is whatever `Trainer.fit` does between
``on_train_batch_start`` and ``on_train_batch_end``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.nullspace.keeper import NullSpaceKeeper
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.toy.judge import TownJudge

SKIPPED = 2  # first steps, which warm up allocators and kernels
TIMED = ("project_gradients_", "reproject_")


@contextmanager
def timed_keeper() -> Iterator[dict[str, float]]:
    """Yield seconds spent in the keeper's methods since the dict was last cleared."""
    spent: dict[str, float] = defaultdict(float)
    originals = {name: getattr(NullSpaceKeeper, name) for name in TIMED}

    def wrap(name: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = originals[name](*args, **kwargs)
            spent[name] += time.perf_counter() - begin
            return result

        return timed

    for name in TIMED:
        setattr(NullSpaceKeeper, name, wrap(name))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(NullSpaceKeeper, name, original)


class StepClock(pl.Callback):
    """Notes each training step's wall time and what the keeper took of it."""

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent = spent
        self.steps: list[dict[str, float]] = []
        self._begin = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.spent.clear()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.steps.append({"step": time.perf_counter() - self._begin} | dict(self.spent))


def even_tokens(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return a reward with signal on any policy: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def fit(reward: Any, policy: PolicySettings, steps: int) -> dict[str, float]:
    """Fit with the quickstart's settings and return medians over the steps that took an optimizer step."""
    pl.seed_everything(0, verbose=False)
    sampling = SamplingConfig(max_new_tokens=32)
    module = GRPOModule(
        reward,
        policy=policy,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        group_size=8,
        sampling=sampling,
        general_max_new_tokens=32,
    )
    data = AlignmentDataModule("toy/harmful", "toy/general", batch_size=12, eval_batch_size=128)
    with timed_keeper() as spent, tempfile.TemporaryDirectory() as folder:
        clock = StepClock(spent)
        # Its on_train_batch_end runs after the clock's: logging is not part of a step here, as in the other columns.
        callbacks = [clock, NullSpaceProjection(cache_dir=None)]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        trainer.fit(module, data)
        begin = time.perf_counter()
        callbacks[1].certificates()  # type: ignore[attr-defined]
        certificates = time.perf_counter() - begin
    counted = [s for s in clock.steps[SKIPPED:] if "reproject_" in s]
    median = {name: statistics.median(s.get(name, 0.0) for s in counted) for name in ("step", *TIMED)}
    shares = [(s["project_gradients_"] + s["reproject_"]) / s["step"] for s in counted]
    return {
        "step_s": median["step"],
        "project_gradients_s": median["project_gradients_"],
        "reproject_s": median["reproject_"],
        "share_of_step": statistics.median(shares),
        "largest_share": max(shares),
        "share_of_all_steps": sum(s["project_gradients_"] + s["reproject_"] for s in counted)
        / sum(s["step"] for s in counted),
        "steps": float(len(counted)),
        "certificates_s": certificates,
        "parameters": float(sum(p.numel() for p in module.parameters())),
    }


def run_quickstart(steps: int = 14) -> dict[str, float]:
    """Fit the embedded policy (NF4 base, rank 8) as ``configs/quickstart.yaml`` does."""
    policy = PolicySettings(path="toy", quantization="nf4", dtype="float32", lora=LoraSettings(r=8, alpha=16))
    return fit(TownJudge(), policy, steps)


def run_27m(model: Any, steps: int = 8) -> dict[str, float]:
    """Fit a random model with the embedded tokenizer and prompts, rank 16, float32."""
    from nspo_lightning.toy.train_tokenizer import train_tokenizer
    from nspo_lightning.toy.world import examples

    tokenizer = train_tokenizer([f"{e.prompt} {e.answer}" for e in examples("benign", "train")[:2000]], 512)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        tokenizer.save_pretrained(Path(folder))
        policy = PolicySettings(path=folder, quantization="none", dtype="float32", lora=LoraSettings(r=16, alpha=32))
        return fit(even_tokens, policy, steps)
