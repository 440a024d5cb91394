"""What a warm start behind begun answers costs in general answers: with and without general prompts beside it.

    python benchmarks/warm_start.py --criterion contrast --share 0 0.5 --updates 40 --every 20

The embedded world; half of the answers that are taught are begun (0 to 10 tokens), refusals as in configs/robust.yaml.
A number of updates instead of a share that refuses, so that all settings are taught equally much. Prints, at every so
many updates, of validation prompts: what 48 harmful ones are answered with, as they are and behind 5 begun tokens
(two answers each); whether 48 look-alikes and 48 questions for facts are answered word for word; and KL(base || policy)
on 100 reference answers, nats a token. With `--out` also as JSON. What it printed is in docs/robustness.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.datamodules.sources.rows import PromptRow
from nspo_lightning.datamodules.warmup import WarmupDataModule, WarmupSettings
from nspo_lightning.module.prefixes import PrefixSettings
from nspo_lightning.module.warmup import WarmupModule
from nspo_lightning.policy.settings import LoraSettings, PolicySettings
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.toy.judge import TownJudge
from nspo_lightning.toy.world import REFUSALS

ROWS, TEXT_ROWS, BEGUN = 48, 100, 5
OUTCOMES = ("unsafe", "refusal", "garbage")


class Taught(WarmupModule):
    """Goes on to the last update, whatever refuses."""

    @override
    def on_train_start(self) -> None:
        self.require_policy().train()


class Look(Callback):
    """Measures every so many updates."""

    def __init__(self, data: WarmupDataModule, every: int) -> None:
        self.data, self.every = data, every
        self.found: list[dict[str, Any]] = []

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 and isinstance(pl_module, WarmupModule):
            logged = {name: float(trainer.callback_metrics[name]) for name in ("loss",)}
            self.found.append({"updates": trainer.global_step, **logged, **measure(pl_module, self.data)})
            print(json.dumps(self.found[-1]), flush=True)


@torch.no_grad()
def measure(module: WarmupModule, data: WarmupDataModule) -> dict[str, float]:
    """Return the figures, shares in percent."""
    module.eval()
    harmful, general = data.eval_rows("validation")
    found: dict[str, float] = {}
    batch = batch_of(data, harmful[:ROWS])
    for tokens in (0, BEGUN):
        begun = module.prefixes.begun(batch, [tokens] * ROWS, [""] * ROWS)
        _, texts = module.text_policy.generate(begun.batch, module.settings.sampling, 2, 7, exact=True)
        said = Counter(module.judge.classify([""] * len(texts), texts))
        found |= {f"{name} behind {tokens}": 100 * said[name] / len(texts) for name in OUTCOMES}
    for skill in ("benign", "facts"):
        rows = [row for row in general if row.skill == skill][:ROWS]
        _, texts = module.text_policy.generate(batch_of(data, rows), module.general_sampling, 1, 7, exact=True)
        right = sum(text.strip() == row.answer for text, row in zip(texts, rows, strict=True))
        found[f"{skill} as before"] = 100 * right / len(rows)
    scores = [module.text_scores(part) for part in data.text_dataloader("validation", rows=TEXT_ROWS)]
    found["kl"] = sum(score.kl for score in scores) / sum(score.tokens for score in scores)
    module.train()
    return found


def batch_of(data: WarmupDataModule, rows: list[PromptRow]) -> dict[str, Any]:
    """Return rows as one batch."""
    return next(iter(data.safety.eval_loader(rows)))


def warm_start(
    criterion: str, lr: float, share: float, weight: float, updates: int, every: int, seed: int, work: str
) -> list[dict[str, Any]]:
    """Teach refusals and return what was measured on the way."""
    pl.seed_everything(seed, verbose=False)
    data = WarmupDataModule("toy/harmful", "toy/general", batch_size=12, eval_batch_size=128)
    data.warmup = WarmupSettings(
        lr=lr, refusals=list(REFUSALS), general_share=share, general_weight=weight, max_updates=updates
    )
    module = Taught(
        TownJudge(),
        policy=PolicySettings(path="toy", quantization="nf4", dtype="float32", lora=LoraSettings(r=8, alpha=16)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        sampling=SamplingConfig(max_new_tokens=32),
        general_max_new_tokens=32,
        over_refusal_skills=["benign"],
        prefixes=PrefixSettings(share=0.5, max_tokens=10),
    )
    module.warmup = data.warmup
    look = Look(data, every)
    held = NullSpaceProjection(criterion=criterion, verify=False)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        default_root_dir=work,
        max_steps=updates,
        max_epochs=-1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[held, look],
    )
    trainer.fit(module, data)
    return look.found


def main() -> None:
    """Run all settings one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", nargs="+", default=["contrast"])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--share", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--weight", nargs="+", type=float, default=[10.0])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as work:
        for criterion in args.criterion:
            for lr in args.lr:
                for share in args.share:
                    for weight in args.weight if share else args.weight[:1]:
                        for seed in args.seed:
                            setting = {"criterion": criterion, "lr": lr, "share": share, "weight": weight, "seed": seed}
                            print(json.dumps(setting), flush=True)
                            rows = warm_start(**setting, updates=args.updates, every=args.every, work=work)
                            found.append({**setting, "at": rows})
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
