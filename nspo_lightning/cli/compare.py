"""The `compare` command: plan, run what is missing, report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from rich import get_console
from rich.console import Console

from nspo_lightning.attacks import find_attacks, is_template_file
from nspo_lightning.checkpoints import FOLDER, last_in
from nspo_lightning.cli.help import PROG
from nspo_lightning.cli.jobs import run_job
from nspo_lightning.cli.parser import KeylessParser
from nspo_lightning.cli.run_config import policy_settings, read_config
from nspo_lightning.compare.methods import LEARNING_RATES, METHODS, as_dicts
from nspo_lightning.compare.plan import RESULT, Budget, RunSpec, as_planned, main_grid
from nspo_lightning.compare.pool import Job, JobResult, run_all
from nspo_lightning.compare.results import Findings, RunResult, current_name
from nspo_lightning.compare.selection import SelectionRule
from nspo_lightning.compare.sweeps import Sweep, make_sweep
from nspo_lightning.datamodules import PromptSource
from nspo_lightning.datamodules.prompts import check_at_least_one
from nspo_lightning.datamodules.sources.domain import DomainSources, load_domain
from nspo_lightning.keys import check_no_key
from nspo_lightning.policy.base_record import gguf_identity
from nspo_lightning.terminal import counted

SweepName = Literal["calibration", "threshold", "data", "rank"]


def main(arguments: list[str]) -> None:
    """Run the `compare` command; errors are raised."""
    parser = KeylessParser(
        prog=f"{PROG} compare",
        description="Methods x seeds x learning rates of one configuration: table, pictures, TensorBoard. "
        "Finished runs are kept: the same command again goes on where it was interrupted.",
    )
    parser.add_function_arguments(compare, skip={"console"})
    compare(**vars(parser.instantiate(parser.parse_args(arguments))))


def compare(
    config: str,
    out: str,
    methods: list[str] | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed; jsonargparse shows it
    learning_rates: list[float] | None = None,
    sweep: SweepName | None = None,
    quick: bool = False,
    steps: int = 100,
    eval_every: int = 5,
    stop_unsafe: float = 0.01,
    unsafe_limit: float = 0.05,
    metric: str = "general/accuracy",
    higher_is_better: bool = True,
    text_rows: int = 128,
    mixed_reward: str | None = None,
    jobs: int | None = None,
    only_report: bool = False,
    attacks: list[str] | None = None,
    console: Console | None = None,
) -> None:
    """Compare methods on one configuration.

    Args:
        config: The configuration of a `fit`; its reward, data, policy and budget are every method's.
        out: Folder of the results.
        methods: Names of methods; all by default.
        seeds: Seeds, at least 3 for a claim.
        learning_rates: The grid, the same for every method; by default half, one, two and four times the
            configuration's (a sweep: the configuration's alone).
        sweep: Instead of methods, vary one setting: what K is computed from, the threshold, the share of the safety
            prompts, or the adapter's rank and place.
        quick: One seed, the larger learning rate, fewer steps: minutes instead of an hour.
        steps: Training steps a run at most.
        eval_every: Training steps between two evaluations; each is a checkpoint that counts.
        stop_unsafe: A run ends once its unsafe rate on validation prompts is at most this.
        unsafe_limit: What counts as safe in the selection.
        metric: What general ability is, for the selection and the pictures.
        higher_is_better: False where less of the metric is better (general/nll).
        text_rows: General rows, spread over skills, whose NLL and KL to the base are measured at each evaluation; 0 =
            none.
        mixed_reward: YAML file with the reward of the method that mixes general prompts in, written as in a
            configuration; by default the configuration's on harmful prompts, and right answers on general ones.
        jobs: Processes at a time; by default one a core on the CPU, else one.
        only_report: Write table and pictures of what is there, run nothing.
        attacks: Also measure each run's selected checkpoint under these attacks, as `test --attacks` does.
        console: Where progress goes.

    Raises:
        ValueError: If an argument is out of range, or the folder holds another comparison.
    """
    from nspo_lightning.compare.summary import write_report

    console, source, folder = console or get_console(), Path(config).resolve(), Path(out).resolve()
    settings = read_config(Path(config), needs={"model": ("reward",), "data": ("safety", "general")})
    if not out:
        raise ValueError("`--out` must name the folder of the results, got ''. Give one, such as runs/compare.")
    check_at_least_one(seeds=len(seeds), steps=steps, eval_every=eval_every, jobs=jobs)
    _check_all_differ(methods=methods, seeds=seeds, learning_rates=learning_rates)
    if attacks is not None:
        find_attacks(attacks)  # an unknown one is found here, before any run
    if eval_every > steps:
        raise ValueError(f"`eval_every` must be at most `steps` ({steps}), got {eval_every}.")
    if quick:
        seeds, steps, eval_every = seeds[:1], min(steps, 60), max(eval_every, 5)
        learning_rates = learning_rates or [2 * _learning_rate(settings)]
    budget = Budget(steps=steps, eval_every=eval_every, stop_unsafe=stop_unsafe)
    rule = SelectionRule(unsafe_limit=unsafe_limit, metric=current_name(metric), higher_is_better=higher_is_better)
    plan, asked = _plan(settings, methods, seeds, learning_rates, sweep, mixed_reward)
    failed: list[JobResult] = []
    trajectory = {**asdict(rule), "text_rows": text_rows, **({"attacks": attacks} if attacks else {})}
    runs = {s.name: s.arguments(source, folder, budget, trajectory) for s in plan}
    if only_report:
        _check_rules(plan, runs, folder)
    else:
        missing = _missing(plan, runs, source, folder, attacks or [])
        workers = jobs or _default_jobs(settings)
        done = f"{len(plan) - len(missing)} done already"
        console.print(f"{counted(len(plan), 'run')}, {done}; {workers} at a time; logs in {folder / 'logs'}")
        failed = [job for job in run_all(missing, workers, console, run_job) if job.error]
    results = _complete(plan, folder)
    if not results and not failed:
        raise ValueError(f"No run is complete in {folder}: nothing to report. Leave `--only_report` out.")
    if results:
        there = {result.spec.name for result in results}
        absent = [spec.name for spec in plan if spec.name not in there]
        findings = Findings(results=results, rule=rule, budget=budget, sweep=asked, planned=len(plan), missing=absent)
        write_report(folder, findings, console)
    if failed:  # a variant that can't be trained is an answer too: the others are reported first
        listing = "\n".join(f"  {o.name}: {o.error}" for o in failed)
        raise ValueError(
            f"{len(failed)} of {counted(len(plan), 'run')} failed; the others are kept and reported:\n{listing}"
        )


def _check_all_differ(**lists: Sequence[Any] | None) -> None:
    """Refuse what is named twice: one run would count as two, and three times the same seed as three seeds."""
    for name, values in lists.items():
        if twice := [value for i, value in enumerate(values or ()) if value in (values or ())[:i]]:
            raise ValueError(f"`{name}` has {twice[0]!r} twice, and each run is made once. Name it once.")


def _plan(
    settings: Mapping[str, Any],
    methods: list[str] | None,
    seeds: list[int],
    learning_rates: list[float] | None,
    sweep: SweepName | None,
    mixed_reward: str | None,
) -> tuple[list[RunSpec], Sweep | None]:
    """Return the runs to make, and the sweep that they are of; None where they are the grid of methods."""
    own = _learning_rate(settings)
    if sweep is not None:
        asked = make_sweep(sweep, settings, calibration_domains(settings) if sweep == "calibration" else [])
        return as_planned(asked.plan(seeds, (learning_rates or [own])[0]), settings), asked
    reward = None if mixed_reward is None else yaml.safe_load(Path(mixed_reward).read_text())
    check_no_key(str(mixed_reward), reward)
    rates = learning_rates or [r * own for r in LEARNING_RATES]
    return as_planned(main_grid(settings, methods or list(METHODS), seeds, rates, reward), settings), None


def _complete(plan: Sequence[RunSpec], folder: Path) -> list[RunResult]:
    """Return the results of a plan that are there."""
    found = ((spec, folder / "runs" / spec.name / RESULT) for spec in plan)
    return [RunResult.read(spec, path) for spec, path in found if path.is_file()]


def calibration_domains(config: Mapping[str, Any]) -> list[str]:
    """List the domains of the calibration text, as the rows themselves name them."""
    sources = [PromptSource(**source) for source in as_dicts(config["data"]["general"])]
    # All rows: what is held out has the same domains.
    rows = load_domain(DomainSources(train=sources, kind="benign", validation_size=0, test_size=0)).train
    return list(dict.fromkeys(row.skill for part in rows for row in part))


def _learning_rate(config: Mapping[str, Any]) -> float:
    init = ((config["model"].get("optimizer") or {}).get("init_args")) or {}
    return float(init.get("lr", 1e-5))


def _default_jobs(config: Mapping[str, Any]) -> int:
    on_cpu = (config.get("trainer") or {}).get("accelerator") == "cpu"
    return (os.cpu_count() or 1) if on_cpu else 1


def _check_rules(plan: Sequence[RunSpec], runs: Mapping[str, list[str]], folder: Path) -> None:
    """Refuse to report runs by other rules than those that they were stopped and selected by."""
    for spec in plan:
        stamp = _stamp(folder, spec)
        if not stamp.is_file() or not (folder / "runs" / spec.name / RESULT).is_file():
            continue
        asked = spec.told(runs[spec.name])
        told = spec.told(json.loads(stamp.read_text())["arguments"])
        if "metric" in told:
            told["metric"] = current_name(told["metric"])
        if others := {name: value for name, value in told.items() if value != asked[name]}:
            options = " ".join(
                f"--{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in others.items()
            )
            said = ", ".join(f"`{name}` {asked[name]}" for name in others)
            raise ValueError(
                f"{spec.name} in {folder} was stopped, or its checkpoint selected, by other rules than this command "
                f"says ({said}), so its figures would stand under a wrong rule. Say what it was run with: {options}"
            )


def _stamp(folder: Path, spec: RunSpec) -> Path:
    """Return where a run's command is noted."""
    return folder / "commands" / f"{spec.name}.json"


def _missing(
    plan: Sequence[RunSpec], runs: Mapping[str, list[str]], config: Path, folder: Path, attacks: Sequence[str]
) -> list[Job]:
    """List what is not there yet; a run of the same name made with other settings is an error, never a result."""
    jobs: list[Job] = []
    # What they say is a setting.
    files = {name: Path(name).expanduser().read_text(encoding="utf-8") for name in attacks if is_template_file(name)}
    files |= gguf_identity(policy_settings(read_config(config), config)) or {}
    for spec in plan:
        place, arguments = folder / "runs" / spec.name, runs[spec.name]
        digest, stamp = spec.digest(arguments, config, folder, files), _stamp(folder, spec)
        if stamp.is_file() and json.loads(stamp.read_text())["digest"] != digest:
            raise ValueError(
                f"{place} was made with other settings than this command's. Choose another `--out`, or remove it."
            )
        if (place / RESULT).is_file():
            continue
        last = last_in(place / FOLDER)
        resume = [f"--ckpt_path={last}"] if last is not None else []
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps({"digest": digest, "arguments": arguments}, indent=1) + "\n")
        jobs.append(Job(name=spec.name, arguments=[*arguments, *resume], log=folder / "logs" / f"{spec.name}.txt"))
    return jobs
