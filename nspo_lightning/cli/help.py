"""The first screen of the command line: what each subcommand is for, and the options that most runs need.

`SUBCOMMAND --help` prints that screen, `--help=all` every setting with its meaning. Nothing here imports torch, so that
a help appears at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from nspo_lightning import __version__
from nspo_lightning.cli.shipped import shipped_configs

PROG = "nspo-lightning" if Path(sys.argv[0]).stem == "nspo-lightning" else "python -m nspo_lightning"
"""How the program was called."""
_OTHER = "nspo-lightning" if PROG.startswith("python") else "python -m nspo_lightning"
HELP = ("-h", "--help")
VERSION = ("-V", "--version")

JOBS: dict[str, str] = {
    "fit": "train: calibrate the null space, then GRPO inside it; writes runs/NAME",
    "warmup": "teach a policy that never refuses a few refusals in the null space; `fit` goes on from them",
    "validate": "measure safety and general ability on the validation split",
    "test": "measure on the held-out split",
    "predict": "write completions with rewards and outcomes to predictions.jsonl",
    "calibrate": "find the null space alone and write it as a file",
    "tamper": "fine-tune policy and base a little, as an attacker would, and see what safety is left",
    "data": "show what would be trained and calibrated on, without a model",
}
"""LightningCLI's and our own that share its configuration."""
TOOLS: dict[str, str] = {
    "judge": "score a file of completions; --preview N: try a training's reward and judge",
    "compare": "methods, seeds and sweeps in one table",
    "evaluate": "lm-evaluation-harness on a base and a trained adapter",
    "export": "a PEFT adapter or a merged model out of a checkpoint",
    "report": "a page of a run, or of several side by side: figures, curves, answers",
    "completion": "print a completion script for bash, zsh or tcsh",
}
COMMON: dict[str, str] = {
    "--config": "YAML file, or the name of a shipped one (quickstart); may be repeated, later ones win",
    "--print_config": "print every setting with its value and stop",
    "--name": "name of the run; it is kept in runs/NAME",
    "--seed_everything": "seed of everything random",
    "--model.policy.path": "folder, hub id or GGUF file of the model; toy = the embedded one",
    "--model.policy.quantization": "nf4, fp4 or none",
    "--data.safety": "prompts to train on: a file, a hub id, or {preset: ...}",
    "--data.general": "general text to protect: one source or a list",
    "--trainer.accelerator": "cpu, gpu or auto; every Trainer flag of Lightning works",
}
TRAINING: dict[str, str] = {
    "--model.optimizer.init_args.lr": "learning rate, where the config names an optimizer",
    "--model.group_size": "completions a prompt",
    "--model.sampling.max_new_tokens": "length limit of a completion",
    "--model.objective.beta": "weight of the KL term (0: none, and no reference pass)",
    "--data.batch_size": "prompts a step",
    "--model.policy.adapter": "adapter to go on from: that of a `warmup` (runs/NAME-warmup/adapter)",
    "--nullspace.enabled": "false = plain GRPO",
    "--nullspace.criterion": "what decides how many directions are protected (auto)",
    "--nullspace.calibration": "basis file that `calibrate` wrote; none = calibrate at the start",
    "--trainer.max_epochs": "passes over the prompts",
    "--trainer.limit_train_batches": "stop an epoch after so many steps",
}
WARMUP: dict[str, str] = {
    "--warmup.refusal_share": "share of answers to held-out harmful prompts that must refuse (0.2)",
    "--warmup.max_updates": "updates after which it has failed (60)",
    "--warmup.lr": "learning rate (5e-4)",
    "--warmup.batch_size": "harmful prompts an update (16)",
    "--warmup.general_share": "share of a batch that is general prompts, on which the base is kept to (0.5)",
    "--warmup.general_weight": "weight of their KL to the base (10)",
    "--warmup.check_every": "updates between checks (4)",
    "--warmup.check_prompts": "held-out prompts of each kind answered at a check (32)",
    "--warmup.max_general_refusals": "stop when so many more general prompts are refused (0.1)",
    "--warmup.refusals": "what is taught: a .txt file of refusals, or rows of prompts with safe answers",
    "--nullspace.calibration": "basis file that `calibrate` wrote; none = calibrate at the start",
}
CHECKPOINT: dict[str, str] = {"--ckpt_path": "checkpoint to go on from: last, last-if-any (or begin), best, or a file"}
ATTACKED: dict[str, str] = {
    "--attacks": "also under attack: default, prefill, decoding, templates, names, a YAML of templates",
    "--data.attack_rows": "held-out prompts of each kind that an attack is tried on (200)",
}
MEASURED: dict[str, str] = {"--ckpt_path": "what is measured: best, last, a checkpoint, or an adapter's folder"}
OPTIONS: dict[str, dict[str, str]] = {
    "fit": {**COMMON, **TRAINING, **CHECKPOINT},
    "warmup": {**COMMON, **WARMUP, **CHECKPOINT},
    "validate": {**COMMON, **MEASURED},
    "test": {**COMMON, **MEASURED, **ATTACKED},
    "predict": {**COMMON, **MEASURED, **ATTACKED},
    "calibrate": {
        **COMMON,
        "--out": "the basis file (basis.safetensors); a picture goes beside it",
        "--keep_moments": "keep second moments by domain in the file",
        "--data.calibration_size": "texts to calibrate on",
        "--nullspace.criterion": "what decides how many directions are protected (auto)",
    },
    "tamper": {
        **COMMON,
        **MEASURED,
        "--steps": "updates on harmless rows (50)",
        "--examples": "harmful examples of the second attack (10), seen --epochs times (5)",
        "--lr": "the attacker's learning rate (5e-4)",
        "--out": "where the table goes as JSON (tamper.json in the run's folder)",
    },
    "data": {**COMMON, "--examples": "rendered texts of each use"},
    "judge": {
        "--config": "YAML with `reward`, or a training configuration, whose reward is taken; judge-rules is shipped",
        "--preview": "instead of a file: answers to so many training prompts (64), rewards, time for an epoch",
        "--input": "jsonl, json, csv or parquet file of prompts and completions",
        "--output": "JSON lines file for the scores (NAME.scores.jsonl)",
        "--prompt_column": "column of the prompts",
        "--completion_column": "column of the completions, if not completion, response, output or answer",
        "--label_column": "column that says which completions are unsafe; agreement with it is printed",
        "--threshold": "a total reward below it counts as judged unsafe (0)",
        "--limit": "rows to read at most",
    },
    "compare": {
        "--config": "configuration of a `fit`, or the name of a shipped one",
        "--out": "folder of the results; the same command again goes on where it was interrupted",
        "--methods": "names of methods, e.g. '[nspo, grpo]'; all by default",
        "--seeds": "at least 3 for a claim ([0, 1, 2])",
        "--learning_rates": "the grid, the same for every method (half, one, two and four times the configuration's)",
        "--attacks": "also measure each run under attacks, e.g. '[default]' (docs/robustness.md)",
        "--sweep": "instead of methods: calibration, threshold, data or rank",
        "--quick": "one seed, fewer steps: minutes instead of an hour",
        "--steps": "training steps a run at most (100)",
        "--jobs": "processes at a time",
        "--only_report": "write table and pictures of what is there, run nothing",
    },
}


def help_text(arguments: Sequence[str]) -> str | None:
    """Return the first screen of help if that is what was asked for; the whole help is the parsers' own."""
    if arguments and arguments[0] in HELP:
        return overview()
    if arguments and arguments[0] in VERSION:
        return f"nspo-lightning {__version__}"
    if arguments and arguments[0] in OPTIONS and any(argument in HELP for argument in arguments[1:]):
        return _screen(arguments[0])
    return None


def unknown_subcommand(arguments: Sequence[str]) -> str | None:
    """Return what to say of a subcommand that there is none of; None where there is one, or an option comes first."""
    known = [*JOBS, *TOOLS]
    if not arguments or arguments[0].startswith("-") or arguments[0] in known:
        return None
    near = get_close_matches(arguments[0], known, n=1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    listing = ", ".join(known)
    return f"there is no subcommand '{arguments[0][:60]}'.{meant} There are: {listing}. `{PROG} --help` explains them."


def overview() -> str:
    """Return the screen that names every subcommand."""
    lines = [
        f"usage: {PROG} SUBCOMMAND [options]      (or: {_OTHER} SUBCOMMAND [options])",
        "",
        "Safety GRPO in the null space of general ability. Start with:",
        "",
        f"  {PROG} fit -c quickstart",
        "",
        *_table("jobs, which share one configuration:", JOBS),
        "",
        *_table("tools:", TOOLS),
        "",
        "SUBCOMMAND --help is one screen, SUBCOMMAND --help=all has every setting; --version says which this is.",
        "Shipped configurations: " + ", ".join(shipped_configs()),
        "Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage. NSPO_LIGHTNING_TRACEBACK=1 shows tracebacks.",
    ]
    return "\n".join(lines)


def _screen(name: str) -> str:
    meaning = {**JOBS, **TOOLS}[name]
    usage = "-c CONFIG [--section.setting VALUE ...]" if name in JOBS else "--config CONFIG [options]"
    values = f" With values: {name} -c CONFIG --print_config." if name in JOBS else ""
    lines = [
        f"usage: {PROG} {name} {usage}",
        "",
        f"{meaning[0].upper()}{meaning[1:]}.",
        "",
        *_table("options most often given:", OPTIONS[name]),
        "",
        f"Everything: {name} --help=all.{values}",
    ]
    return "\n".join(lines)


def _table(title: str, rows: dict[str, str]) -> list[str]:
    width = max(len(name) for name in rows)
    return [title, *(f"  {name.ljust(width)}  {meaning}" for name, meaning in rows.items())]
