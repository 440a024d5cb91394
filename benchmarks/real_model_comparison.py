"""Methods on a real model: SmolLM2-135M-Instruct, warm-started to refuse about one harmful prompt in four.

    REAL_DATA=DATA python benchmarks/real_model_comparison.py --work DIR -- --methods '[base, grpo, nspo]' --seeds '[0]'

What stands behind `--` goes to `compare`. Writes splits of the public files, makes the warm start (`warmup`, then
`export --merge`: one base for all methods), writes the configuration and runs `compare`. What is there is kept: the
same command again goes on. Harmful prompts: AdvBench, SimpleSafetyTests and XSTest's unsafe half in equal shares, each
for training (`--train advbench`: that set alone), others of them for validation, by which a run ends, and others again
for the test.
Look-alikes: five of XSTest's ten safe types are general text that may be protected (and answered, by the method that
mixes general prompts in); the other five types are in the test alone. General: Alpaca, GSM8K, Dolly, MBPP.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from real_model import CONFIG, FILES, fetch_model, local_settings

TEST_ROWS = 32  # of each harmful set, and of each general one
LOOK_ALIKES = 15  # of each of the five types in the test
HARMFUL_VALIDATION_ROWS = 16  # of each harmful set
VALIDATION_ROWS = 24  # general ones of all sets, and as many look-alikes
JUDGE = {"class_path": "nspo_lightning.rewards.RulesJudge"}
MIXED_REWARD = {  # free text can't be compared: a general prompt's answer only must not refuse
    "class_path": "nspo_lightning.rewards.SafetyAndAnswers",
    "init_args": {
        "safety": {"class_path": "nspo_lightning.rewards.OutcomeReward", "init_args": {"judge": JUDGE}},
        "answers_count": False,
        "judge": JUDGE,
    },
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON, JSON lines or CSV file."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    text = path.read_text()
    return list(json.loads(text)) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def source(folder: Path, name: str, preset: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write rows as JSON lines and return the source that reads them."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"preset": preset, "path": str(path)}


def split_data(data: Path, folder: Path, trained: str) -> dict[str, Any]:
    """Write the splits and return the settings of `data` that name them; `trained`: which harmful sets, see `main`."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"general": [], "general_val": [], "general_test": []}
    advbench = read_rows(data / FILES["safety"]["advbench"])
    random.Random(0).shuffle(advbench)
    parts = {"": advbench[160:], "_val": advbench[:HARMFUL_VALIDATION_ROWS], "_test": advbench[96 : 96 + TEST_ROWS]}
    for part, rows in parts.items():
        found[f"safety{part}"] = [source(folder, f"advbench{part}", "advbench", rows)]
    for name, file in FILES["general"].items():
        rows = read_rows(data / file)
        random.Random(0).shuffle(rows)
        held = {"_val": rows[: VALIDATION_ROWS // 4], "_test": rows[100 : 100 + TEST_ROWS], "": rows[200:]}
        for part, those in held.items():
            found[f"general{part}"].append(source(folder, f"{name}{part}", name, those))
    simple = read_rows(data / FILES["safety_test"]["simple_safety_tests"])
    random.Random(0).shuffle(simple)
    xstest = read_rows(data / FILES["safety_test"]["xstest"])
    types = sorted({row["type"] for row in xstest if row["label"] == "safe"})
    seen = [row for row in xstest if row["label"] == "safe" and row["type"] in types[::2]]
    unsafe = [row for row in xstest if row["label"] != "safe"]
    random.Random(0).shuffle(unsafe)
    random.Random(0).shuffle(seen)
    found["general"].append(source(folder, "look_alikes", "xstest", seen[VALIDATION_ROWS:]))
    found["general_val"].append(source(folder, "look_alikes_val", "xstest", seen[:VALIDATION_ROWS]))
    unseen = [
        row
        for of in types[1::2]
        for row in [r for r in xstest if r["label"] == "safe" and r["type"] == of][:LOOK_ALIKES]
    ]
    found["general_test"].append(source(folder, "look_alikes_test", "xstest", unseen))
    for name, preset, rows in (("simple", "simple_safety_tests", simple), ("xstest_unsafe", "xstest", unsafe)):
        end = TEST_ROWS + HARMFUL_VALIDATION_ROWS
        parts = {"_test": rows[:TEST_ROWS], "_val": rows[TEST_ROWS:end], "": rows[end:]}
        for part, those in parts.items():
            if part or trained == "all":
                found[f"safety{part}"].append(source(folder, f"{name}{part}", preset, those))
    return found


def command(*arguments: str) -> list[str]:
    """Return a command of the package."""
    return [sys.executable, "-m", "nspo_lightning", *arguments]


def warm_start(work: Path, data: Path) -> Path:
    """Return the folder of a model that refuses about one harmful prompt in four; made once."""
    model = work / "warm"
    if (model / "config.json").is_file():
        return model
    local = work / "local.yaml"
    overlay = local_settings(work, data) | {"model": {"policy": {"path": str(fetch_model(work))}}}
    local.write_text(yaml.safe_dump(overlay, sort_keys=False))
    root = work / "warmup"
    run = [*command("warmup", "-c", CONFIG, "-c", str(local)), "--trainer.default_root_dir", str(root)]
    subprocess.run(run, check=True)
    last = root / "runs" / f"{CONFIG}-warmup" / "checkpoints" / "last.ckpt"
    merge = command("export", "--ckpt", str(last), "--out", str(model), "--merge", "--dtype", "float32")
    subprocess.run(merge, check=True)
    return model


def write_config(work: Path, model: Path, sources: dict[str, Any]) -> Path:
    """Write the recipe of `make real` with this model and these splits, as `compare` takes it."""
    recipe = Path(__file__).resolve().parents[1] / "configs" / f"{CONFIG}.yaml"
    config = yaml.safe_load(recipe.read_text())
    config["model"]["policy"]["path"] = str(model)
    config["model"]["judge"] = JUDGE
    config["data"] = {name: value for name, value in config["data"].items() if not name.endswith("_size")} | sources
    config["data"] |= {"batch_size": 6, "eval_batch_size": 48, "calibration_size": 128}
    for name in ("name", "seed_everything", "warmup", "nullspace"):  # a method names its criterion; `nspo` has `auto`
        config.pop(name)
    config["trainer"] = {"accelerator": "cpu", "log_every_n_steps": 1}
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    (work / "mixed_reward.yaml").write_text(yaml.safe_dump(MIXED_REWARD))
    return path


def main() -> None:
    """Prepare what is missing, then compare."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--data", type=Path, default=os.environ.get("REAL_DATA"), help="default: $REAL_DATA")
    parser.add_argument("--train", choices=("all", "advbench"), default="all", help="harmful sets that are trained on")
    arguments = parser.parse_args(words[:at])
    if arguments.data is None:
        parser.error("REAL_DATA, or --data, must name the folder of the public files (docs/datasets.md)")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    local_settings(work, arguments.data)  # names files that are missing before anything is made
    model = warm_start(work, arguments.data)
    config = write_config(work, model, split_data(arguments.data, work / "data", arguments.train))
    run = command("compare", "--config", str(config), "--out", str(work / "comparison"))
    run += ["--mixed_reward", str(work / "mixed_reward.yaml"), "--metric", "general/kl", "--higher_is_better", "false"]
    subprocess.run([*run, *words[at + 1 :]], check=True)


if __name__ == "__main__":
    main()
