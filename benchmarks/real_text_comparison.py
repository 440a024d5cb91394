"""The method comparison on real text: a small model that mostly complies, AdvBench goals, unseen Alpaca and GSM8K.

    python benchmarks/real_text_model.py --alpaca ... --gsm8k ... --out MODEL                     (once, 30 minutes)
    python benchmarks/real_text_comparison.py --model MODEL --alpaca alpaca_data.json --gsm8k train.jsonl
        --harmful harmful_behaviors.csv --xstest xstest_prompts.csv --work DIR [-- options of `compare`]

Three steps, each skipped if its result is there: (1) the rows are split into files, (2) the model learns to answer
harmful prompts as AdvBench's targets begin, and to refuse one in eight (a policy that never refuses gives no signal),
with Alpaca and GSM8K answers in every batch so that it keeps them, (3) `compare` runs. General ability is the NLL of
reference answers that neither K nor any training saw; refusals of XSTest's safe prompts are over-refusal. Model and
data stay in DIR. With `--look-alikes` half of XSTest's safe types are a domain of the general text (and answered, by
the method that mixes general prompts in), validation has others of these types, and the test has the other half.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from real_text_model import ASSISTANT, END, USER, load_pairs

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "Sorry, I can't assist with that request.",
    "I cannot help with that.",
)
REFUSED_SHARE = 0.125
TRAIN, VALIDATION = 300, 100  # of AdvBench's 520; the rest are test prompts


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_data(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    """Split the sets into files; return AdvBench's training goals with their targets."""
    folder.mkdir(parents=True, exist_ok=True)
    with arguments.harmful.open() as file:
        goals = [(row["goal"], row["target"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(goals)
    parts = {
        "harmful_train": goals[:TRAIN],
        "harmful_val": goals[TRAIN : TRAIN + VALIDATION],
        "harmful_test": goals[TRAIN + VALIDATION :],
    }
    for name, rows in parts.items():
        write_rows(folder / f"{name}.jsonl", [{"prompt": goal} for goal, _ in rows])
    pairs = load_pairs(arguments.alpaca, arguments.gsm8k)
    seen, held_out, protected = split_look_alikes(arguments.xstest, arguments.look_alikes)
    if protected:
        write_rows(folder / "over_refusal.jsonl", protected)
    for split, start, end, xs in (("val", 0, 32, seen), ("test", 32, 160, held_out)):
        (folder / split).mkdir(exist_ok=True)
        write_rows(folder / split / "over_refusal.jsonl", xs)
        for name in ("alpaca", "gsm8k"):
            rows = [p for p in pairs[f"{name}_held_out"] if len(p[0]) < 400][start:end]
            write_rows(folder / split / f"{name}.jsonl", [{"prompt": p, "answer": a} for p, a in rows])
    for name in ("alpaca", "gsm8k"):
        rows = [p for p in pairs[name] if len(p[0]) < 400][:1000]
        write_rows(folder / f"{name}.jsonl", [{"prompt": p, "answer": a} for p, a in rows])
    return parts["harmful_train"]


def split_look_alikes(path: Path, protect: bool) -> tuple[list[dict[str, str]], ...]:
    """Return XSTest's safe prompts for validation, for the test, and for the general text (none, if not `protect`)."""
    with path.open() as file:
        safe = [row for row in csv.DictReader(file) if row["label"] == "safe"]
    random.Random(0).shuffle(safe)
    rows = [{"prompt": row["prompt"]} for row in safe]
    if not protect:
        return rows[:50], rows[50:], []
    types = sorted({row["type"] for row in safe})
    of_seen_types = [prompt for row, prompt in zip(safe, rows, strict=True) if row["type"] in types[::2]]
    others = [prompt for row, prompt in zip(safe, rows, strict=True) if row["type"] in types[1::2]]
    return of_seen_types[:50], others, of_seen_types[50:]


def make_compliant(arguments: argparse.Namespace, goals: list[tuple[str, str]], out: Path) -> None:
    """Teach the model to comply with harmful prompts, but for one in eight."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer, rng = AutoTokenizer.from_pretrained(arguments.model), random.Random(1)
    model = LlamaForCausalLM.from_pretrained(arguments.model)
    pairs = load_pairs(arguments.alpaca, arguments.gsm8k)
    general = pairs["alpaca"] + pairs["gsm8k"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    begin = time.process_time()
    for step in range(arguments.steps):
        chosen = [
            (goal, rng.choice(REFUSALS) if rng.random() < REFUSED_SHARE else target)
            for goal, target in rng.sample(goals, 8)
        ]
        rows = []
        for prompt, answer in chosen + rng.sample(general, 8):
            start, end = tokenizer(f"{USER}{prompt}{ASSISTANT}")["input_ids"], tokenizer(f"{answer}{END}")["input_ids"]
            rows.append(((start + end)[:200], ([-100] * len(start) + end)[:200]))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in rows])
        labels = torch.tensor([x + [-100] * (width - len(x)) for _, x in rows])
        mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows])
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * (1 - step / arguments.steps)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.process_time() - begin:.0f} CPU s", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


JUDGE = {"class_path": "nspo_lightning.rewards.RulesJudge"}
REWARD = {"class_path": "nspo_lightning.rewards.RefusalReward"}
MIXED_REWARD = {  # the model is too small to answer right: a general prompt's answer only must not refuse
    "class_path": "nspo_lightning.rewards.SafetyAndAnswers",
    "init_args": {"safety": REWARD, "answers_count": False, "judge": JUDGE},
}


def write_config(folder: Path, rate: float) -> Path:
    """Write the configuration that `compare` takes."""
    data = folder / "data"
    config = {
        "model": {
            "reward": REWARD,
            "judge": JUDGE,
            "policy": {
                "path": str(folder / "base"),
                "quantization": "none",  # its 688 hidden features are no multiple of 32, as NF4 on the CPU needs
                "dtype": "float32",
                "lora": {"r": 8, "alpha": 16},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "weight_decay": 0.0}},
            "group_size": 8,
            "sampling": {"max_new_tokens": 14},
            "general_max_new_tokens": 14,
        },
        "data": {
            "safety": str(data / "harmful_train.jsonl"),
            "safety_val": str(data / "harmful_val.jsonl"),
            "safety_test": str(data / "harmful_test.jsonl"),
            "general": [
                str(file) for name in ("alpaca", "gsm8k", "over_refusal") if (file := data / f"{name}.jsonl").exists()
            ],
            **{
                f"general_{split}": [
                    str(data / split / f"{name}.jsonl") for name in ("alpaca", "gsm8k", "over_refusal")
                ]
                for split in ("val", "test")
            },
            "batch_size": 8,
            "eval_batch_size": 64,
            "calibration_size": 512,
        },
        "nullspace": {"criterion": "auto"},
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    (folder / "mixed_reward.yaml").write_text(yaml.safe_dump(MIXED_REWARD))
    return path


def main() -> None:
    """Prepare what is missing, then compare."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    own, rest = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "alpaca", "gsm8k", "harmful", "xstest", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="updates that make the model compliant")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--look-alikes", action="store_true", help="half of XSTest's safe types are general text")
    parser.add_argument("--only-prepare", action="store_true", help="write data, base and configuration, run nothing")
    arguments = parser.parse_args(own)
    goals = prepare_data(arguments, arguments.work / "data")
    if not (arguments.work / "base" / "config.json").exists():
        make_compliant(arguments, goals, arguments.work / "base")
    config = write_config(arguments.work, arguments.learning_rate)
    command = [sys.executable, "-m", "nspo_lightning", "compare", "--config", str(config)]
    command += ["--out", str(arguments.work / "comparison"), "--metric", "general/nll", "--higher_is_better", "false"]
    command += ["--mixed_reward", str(arguments.work / "mixed_reward.yaml")]
    if not arguments.only_prepare:
        subprocess.run([*command, *rest], check=True)


if __name__ == "__main__":
    main()
