"""`compare` on a small real model that is given, as many runs as fit.

MODEL135 names the model: a folder as transformers saves one, or a .gguf file, which is turned into one first. DATA135
names a folder with harmful.jsonl and general.jsonl (`prompt`, and `answer` in the latter); without it the embedded
world's rows are used, which say whether the machinery works and how fast, and nothing of real safety.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from commands import checked, run
from device import Device
from record import Record
from workload import Scale

METHODS = ["base", "nspo", "grpo", "random"]
ENGLISH = (
    "The sun rises in the east and sets in the west. Every spring the farmers sow their fields, and in the autumn they "
    "bring in the harvest. Children walk to school in the morning and come home in the afternoon."
)
MOST_NATS = 5.0  # a small model has about 3 nats a token; one whose weights were read wrongly has more than 6
REPORT_SECONDS = 20.0


def folder_of(path: Path, made: Path) -> Path:
    """Return a folder that `policy.path` takes, and see that the model in it reads English.

    Raises:
        RuntimeError: If a converted model doesn't.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path.is_dir():
        return path
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nats = float(model(input_ids=ids, labels=ids).loss)
    if not nats < MOST_NATS:
        raise RuntimeError(f"{path.name} has {nats:.2f} nats a token on plain English: its weights were read wrongly.")
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def write_config(scale: Scale, device: Device, model: Path, data: str | None, path: Path) -> Path:
    """Write the configuration of the runs."""
    safety, general = ("toy/harmful", "toy/general")
    if data:
        safety, general = (str(Path(data).resolve() / f"{name}.jsonl") for name in ("harmful", "general"))
    tiny = scale.compared_steps < 10
    config = {
        "model": {
            "reward": {"class_path": "nspo_lightning.rewards.RefusalReward"},
            "judge": {"class_path": "nspo_lightning.rewards.RulesJudge"},
            "policy": {
                "path": str(model.resolve()),
                "quantization": "none",
                "dtype": "bfloat16" if device.is_cuda else "float32",
                "lora": {"r": 16, "alpha": 32},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-4, "weight_decay": 0.0}},
            "group_size": 8,
            "sampling": {"max_new_tokens": 8 if tiny else 32},
            "general_max_new_tokens": 8 if tiny else 32,
        },
        "data": {
            "safety": safety,
            "general": general,
            "batch_size": 4 if tiny else 16,
            "eval_batch_size": 64,
            "calibration_size": 32 if tiny else 512,
        },
        "trainer": {
            "accelerator": "gpu" if device.is_cuda else "cpu",
            "devices": 1,
            "precision": "bf16-mixed" if device.is_cuda else 32,
            "limit_val_batches": 1 if tiny else 2,
            "limit_test_batches": 1 if tiny else 2,
            "log_every_n_steps": 1,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def measure(scale: Scale, device: Device, record: Record, folder: Path, model: str) -> dict[str, Any]:
    """Run methods and seeds until the time is over, and report what is complete.

    Raises:
        RuntimeError: If no run is.
    """
    data = os.environ.get("DATA135")
    config = write_config(scale, device, folder_of(Path(model), folder / "model"), data, folder / "config.yaml")
    out = record.path.parent / "compare"
    methods, seeds = (METHODS if scale.compared_seeds > 1 else METHODS[:2]), list(range(scale.compared_seeds))
    command = [sys.executable, "-W", "ignore", "-m", "nspo_lightning", "compare", "--config", str(config)]
    command += ["--out", str(out), "--methods", json.dumps(methods), "--seeds", json.dumps(seeds)]
    command += ["--learning_rates", "[2e-4]", "--steps", str(scale.compared_steps)]
    command += ["--eval_every", str(max(scale.compared_steps // 3, 1)), "--jobs", "4" if device.is_cuda else "1"]
    command += ["--metric", "general/nll", "--higher_is_better", "false", "--text_rows", "32"]
    log = record.path.with_suffix(".output.txt")
    done = run(command, log, record.left() - REPORT_SECONDS)
    if done["exit_code"] is None:
        done = checked(run([*command, "--only_report", "true"], log, record.left() - 2)) | {"cut_off": True}
    results = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("runs/*/result.json"))}
    if not results:
        raise RuntimeError(f"No run is complete. The output ends:\n{done['output_ends']}")
    runs = {name: {key: run[key] for key in ("seconds", "selected", "test", "leak")} for name, run in results.items()}
    planned = 1 + (len(methods) - 1) * len(seeds)
    return done | {"rows": data or "the embedded world's", "planned": planned, "complete": len(runs), "runs": runs}


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Compare, if a model is given."""
    model = os.environ.get("MODEL135")
    if not model:
        record.end("skipped", reason="MODEL135 names no model")
        return
    record.attempt("compare", lambda: measure(scale, device, record, folder, model))
