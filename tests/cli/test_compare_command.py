"""The whole command on a tiny plan, interrupted and resumed; the report from results made by hand."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
import torch
import yaml
from paths import python_path
from rich.console import Console

from nspo_lightning.cli import compare as command
from nspo_lightning.cli.compare import compare, main
from nspo_lightning.cli.jobs import run_job
from nspo_lightning.compare.plan import Budget, RunSpec
from nspo_lightning.compare.pool import Job, JobResult, Run, run_one
from nspo_lightning.compare.results import Findings, RunResult, group_results
from nspo_lightning.compare.sections import not_run
from nspo_lightning.compare.selection import SelectionRule
from nspo_lightning.compare.summary import screen_table, write_report

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
QUIET = Console(quiet=True)


OFF = {"nullspace.enabled": False}


def result(method: str, seed: int, rate: float | None, unsafe: float, accuracy: float) -> RunResult:
    metrics = {
        "safety/unsafe_rate": unsafe,
        "safety/refusal_rate": 1 - unsafe,
        "safety/garbage_rate": 0.0,
        "general/accuracy": accuracy,
        "general/over_refusal_rate": 0.0,
        "general/refusal_rate": 0.2,
        "general/refusal_rate/say": 0.2,
        "general/kl": 0.01,
        "general/kl_first": 0.5,
        "general/nll": 1.0 - accuracy,
        "safety/kl": 2.0,
        "weights/change": 3.0,
    }
    half = metrics | {"safety/unsafe_rate": 0.5, "rollouts": 5.0, "steps": 5.0, "general/kl": 0.005}
    half |= {"safety/kl": 1.0, "weights/change": 2.0}
    return RunResult(
        spec=RunSpec(method=method, seed=seed, learning_rate=rate, settings={} if method == "nspo" else OFF),
        selected=metrics | {"rollouts": 10.0},
        test=metrics,
        prompts={"harmful": 40, "general": 50},
        trajectory=[half, metrics | {"rollouts": 10.0, "steps": 10.0}],
        seconds=1.0,
        leak=1e-7 if method == "nspo" else None,
        null_share=0.3 if method == "nspo" else None,
        energy_left=0.1 if method == "nspo" else None,
        cost={"step_seconds": 2.0, "step_cpu_seconds": 1.5 if method == "nspo" else 1.0, "setup_seconds": 7.0}
        | {"held_bytes": 3.0 * 2**20},
    )


RESULTS = [
    result("base", 0, None, 0.9, 0.95),
    *(result("grpo", seed, rate, 0.01, 0.8 + rate) for seed in (0, 1) for rate in (0.1, 0.05)),
    *(result("nspo", seed, rate, 0.02 if rate == 0.1 else 0.2, 0.94) for seed in (0, 1) for rate in (0.1, 0.05)),
]


def test_a_file_of_attack_templates_that_changed_is_another_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else runs before and after the change would stand in one table."""
    file = tmp_path / "mine.yaml"
    file.write_text("templates: {mine: 'Now {request}'}")
    monkeypatch.setattr(command, "run_all", lambda *_: [])
    out = tmp_path / "out"
    settings: dict[str, Any] = {"config": QUICKSTART, "out": str(out), "methods": ["base"], "attacks": [str(file)]}
    settings |= {"seeds": [0], "learning_rates": [1e-3], "console": QUIET}
    for _ in range(2):
        with pytest.raises(ValueError, match="No run is complete"):
            compare(**settings)
    file.write_text("templates: {mine: 'Then {request}'}")
    with pytest.raises(ValueError, match="made with other settings"):
        compare(**settings)


def test_the_learning_rate_is_selected_by_the_same_rule_as_checkpoints() -> None:
    groups = group_results(RESULTS, SelectionRule())
    assert groups["GRPO"].learning_rate == 0.1  # abler
    assert groups["NSPO"].learning_rate == 0.1  # the other is not safe


def test_the_report_says_what_it_rests_on_and_writes_a_row_a_run(tmp_path: Path) -> None:
    budget = Budget(steps=10, eval_every=5, stop_unsafe=0.01)
    write_report(
        tmp_path,
        Findings(results=RESULTS, rule=SelectionRule(), budget=budget, sweep=None, planned=20, missing=["soft-seed2"]),
        QUIET,
    )
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == len(RESULTS)
    assert {r["method"] for r in rows} == {"base", "grpo", "nspo"}
    text = (tmp_path / "summary.md").read_text()
    for phrase in (
        "Incomplete: 9 of 20 runs",
        "40 harmful and 50 general test prompts",
        "| GRPO | 0.1 | 1.0 ± 0.0 % [",
        "-5.0",  # 90 % against the base's 95 %
        "1e-07",
        "| ordinary refused | over-refusal | KL to base | KL first 3 tokens | NLL change |",
        "| NLL change | KL on harmful prompts | norm of the update |",
        "| 20.0 ± 0.0 % | 0.0 ± 0.0 % | 0.0100 | 0.5000 | +0.0500 | 2.0000 | 3.0000 |",
        "lowest general/kl_first on validation prompts",
        "lowest general/refusal_rate on validation prompts",
        "at most 0.05 on validation prompts",
        "| NSPO | 0.1 | 2 | 0.0100 | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 | 1.00 | 0.5000 | 20.0 % |",
        "norm of the update: slope 1.71, R² 1.00; KL on harmful prompts: slope 1.00, R² 1.00.",
        "| NSPO | 1.00 | 1.00 |",
        "| NSPO | 2.00 | 1.50 | +50 % | 7 | 3.0 |",
        "Runs of this plan that are not done, or failed: soft-seed2.",
        "Other learning rates than 0.05, 0.1: four are the default.",
        "Other seeds than 0, 1: three",
        "Methods: anchor, b_only,",
    ):
        assert phrase in text, phrase
    console = Console(width=80, file=StringIO())
    console.print(screen_table(Findings(results=RESULTS, rule=SelectionRule(), budget=budget, sweep=None, planned=20)))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"│ GRPO +│ 0.1 │ +1.0 │ +90.0 │ +-5.0 │ +20.0 │ 0.0100 │", shown), shown
    for picture in ("tradeoff.png", "curves.png", "forgetting_by_norm.png", "forgetting_by_safety_kl.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(RESULTS)


def test_results_of_earlier_versions_are_read_and_what_they_lack_is_blank(tmp_path: Path) -> None:
    older = {"safety/unsafe_rate": 0.1, "general/accuracy": 0.9, "text/kl": 0.02, "text/nll": 1.5, "text/nll/say": 1.5}
    older |= {"general/over_refusal_rate": 0.3, "general/refusal_rate": 0.3}  # which had look-alikes among them
    content: dict[str, Any] = {"selected": older, "test": older, "trajectory": [older | {"rollouts": 5.0}]}
    content["trajectory"][0]["steps"] = 5.0
    content |= {"test_prompts": {"harmful": 9, "general": 9}, "seconds": 1.0}
    (tmp_path / "result.json").write_text(json.dumps(content | dict.fromkeys(("leak", "null_share", "energy_left"))))
    read = RunResult.read(RunSpec(method="grpo", seed=2, learning_rate=0.1), tmp_path / "result.json")
    assert (read.test["general/kl"], read.selected["general/nll/say"]) == (0.02, 1.5)
    assert "general/refusal_rate" not in read.trajectory[0]
    budget = Budget(steps=10, eval_every=5, stop_unsafe=0.01)
    rule = SelectionRule(metric="general/nll", higher_is_better=False)
    write_report(tmp_path, Findings(results=[read], rule=rule, budget=budget, sweep=None, planned=1), QUIET)
    assert "| 30.0 % | 0.0200 |  |  |  |  |" in (tmp_path / "summary.md").read_text()
    assert not list(tmp_path.glob("forgetting*"))


def test_methods_run_are_kept_and_a_run_made_with_other_settings_is_never_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    resumed: list[str] = []

    def pretend(jobs: list[Job], workers: int, console: Console, run: Run) -> list[JobResult]:
        for job in jobs:
            ran.append(job.name)
            resumed.extend(argument for argument in job.arguments if "ckpt_path" in argument)
            if len(ran) == 2:
                numbered = tmp_path / "runs" / job.name / "checkpoints" / "last-v1.ckpt"
                numbered.parent.mkdir(parents=True)
                numbered.touch()
                raise KeyboardInterrupt
            done = RESULTS[0]
            content: dict[str, Any] = {k: getattr(done, k) for k in ("selected", "test", "trajectory", "seconds")}
            content |= {"test_prompts": done.prompts, "leak": None, "null_share": None, "energy_left": None}
            place = tmp_path / "runs" / job.name
            place.mkdir(parents=True, exist_ok=True)
            (place / "result.json").write_text(json.dumps(content))
        return []

    monkeypatch.setattr(command, "run_all", pretend)
    settings: dict[str, Any] = {"config": QUICKSTART, "out": str(tmp_path), "methods": ["base", "nspo", "soft"]}
    settings |= {"seeds": [0], "learning_rates": [1e-3], "console": QUIET}
    with pytest.raises(KeyboardInterrupt):
        compare(**settings)
    compare(**settings)
    assert ran == ["base-seed0", "nspo-lr0.001-seed0", "nspo-lr0.001-seed0", "soft-lr0.001-seed0"]
    assert resumed == [f"--ckpt_path={tmp_path}/runs/nspo-lr0.001-seed0/checkpoints/last-v1.ckpt"]
    compare(**settings)
    assert len(ran) == 4  # nothing left to do
    with pytest.raises(ValueError, match="other settings"):
        compare(**settings, steps=50)
    compare(**settings, only_report=True)
    for other, said in (
        ({"steps": 50}, "--steps 100"),
        ({"eval_every": 10}, "--eval_every 5"),
        ({"unsafe_limit": 0.1}, "--unsafe_limit 0.05"),
    ):
        with pytest.raises(ValueError, match=f"other rules .*{said}"):
            compare(**settings, only_report=True, **other)
    assert "after 100 training steps; evaluated every 5 steps" in (tmp_path / "summary.md").read_text()


def test_many_runs_that_are_not_there_are_counted_by_method() -> None:
    budget = Budget(steps=10, eval_every=5, stop_unsafe=0.01)
    names = [
        f"{method}-lr{rate:g}-seed{seed}" for method in ("soft", "b_only") for rate in (1e-4, 2e-4) for seed in range(4)
    ]
    findings = Findings(results=RESULTS, rule=SelectionRule(), budget=budget, sweep=None, planned=30, missing=names)
    assert "- Runs of this plan that are not done, or failed: 16, of soft (8), b_only (8)." in not_run(findings)
    few = replace(findings, missing=names[:2])
    assert "- Runs of this plan that are not done, or failed: soft-lr0.0001-seed0, soft-lr0.0001-seed1." in not_run(few)


def test_methods_with_fewer_seeds_stand_beside_the_others_with_what_they_have(tmp_path: Path) -> None:
    further = [result("grpo", 2, 0.1, 0.01, 0.9), result("nspo", 2, 0.1, 0.02, 0.94)]
    slow = result("ogpsa", 2, 0.1, 0.01, 0.9)
    slow.trajectory[0]["steps"] = 20.0  # unsafe still
    slow.trajectory[1]["steps"] = 30.0
    further[0].trajectory[1]["steps"] = 15.0
    results = [*(run for run in RESULTS if run.spec.learning_rate != 0.05), *further, slow]
    budget = Budget(steps=10, eval_every=5, stop_unsafe=0.01)
    findings = Findings(results=results, rule=SelectionRule(), budget=budget, sweep=None, planned=9)
    write_report(tmp_path, findings, QUIET)
    text = (tmp_path / "summary.md").read_text()
    for phrase in (
        "bootstrap resamples of seeds 0, 1, 2 in which",
        "| NSPO | 0.1 | 3 | 0.0100 | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 | 1.00 |",
        "| OGPSA | 0.1 | 1 | 0.0100 | +0.0000 | +0.0000 |  | 0.5000 |",
        "| 30 | 2.00 |",  # 30 steps against GRPO's 15 at this seed, not against 11.7, its mean over three
        "| OGPSA | 0.1 | 1.0 % [",
    ):
        assert phrase in text, phrase
    console = Console(width=80, file=StringIO())
    console.print(screen_table(findings))
    assert isinstance(console.file, StringIO)
    assert "OGPSA (1 seed)" in console.file.getvalue()
    assert "NSPO (" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"config": "nowhere.yaml"}, "There is no configuration at"),
        ({"methods": ["nspo", "magic"]}, "'magic'"),
        ({"eval_every": 50, "steps": 20}, "`eval_every` must be at most"),
        ({"only_report": True}, "nothing to report"),
        ({"jobs": 0}, "`jobs` must be at least 1"),
        ({"seeds": [0, 1, 0]}, "`seeds` has 0 twice"),
        ({"learning_rates": [1e-4, 0.0001]}, "`learning_rates` has 0.0001 twice"),
    ],
)
def test_mistakes_are_said_before_anything_runs(options: dict[str, Any], phrase: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"config": QUICKSTART, "out": str(tmp_path / "out"), "console": QUIET} | options
    with pytest.raises(ValueError, match=phrase):
        compare(**settings)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_configuration_without_a_reward_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"no `model\.reward`"):
        compare(config=str(path), out=str(tmp_path / "out"), console=QUIET)


def test_a_failed_run_is_named_with_its_log_and_does_not_end_the_others(tmp_path: Path) -> None:
    job = Job(name="x", arguments=["fit", "--nothing"], log=tmp_path / "x.txt")
    outcome = run_one(job, run_job)
    assert "exit code 2" in outcome.error
    assert "x.txt" in outcome.error
    assert "nothing" in job.log.read_text()


def small_quickstart(folder: Path) -> Path:
    """The quickstart with few prompts to sample, to evaluate and to calibrate on, and a base that is quick on a CPU."""
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    config["model"] |= {"group_size": 4}
    config["model"]["policy"] |= {"quantization": "none"}
    config["data"] |= {"batch_size": 4, "calibration_size": 64}
    for part, split in (("val", "validation"), ("test", "test")):
        for use, rows in (("safety", "toy/harmful"), ("general", "toy/general")):
            config["data"][f"{use}_{part}"] = {"path": rows, "split": split, "count": 12}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def test_two_real_runs_measure_select_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(small_quickstart(tmp_path)), "--out", str(tmp_path), "--methods", "[base,nspo]"]
    arguments += ["--seeds", "[0]", "--learning_rates", "[1e-3]", "--steps", "2", "--eval_every", "1"]
    arguments += ["--text_rows", "2", "--jobs", "1"]
    main(arguments)
    assert "Comparing: 2 runs ..." in capsys.readouterr().err.splitlines()
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    for name in ("general/kl", "general/kl_first", "safety/kl", "safety/kl_first", "weights/change"):
        assert rows["base"][f"test/{name}"] == "0.0"
        assert float(rows["nspo"][f"validation/{name}"]) >= 0
    for split in ("validation", "test"):
        assert 0 <= float(rows["nspo"][f"{split}/general/kl_first"]) < 0.1
        assert float(rows["nspo"][f"{split}/general/nll"]) > 0
    assert rows["nspo"]["test/general/refusal_rate"] == "0.0"
    assert float(rows["base"]["test/general/accuracy"]) > 0.9
    assert float(rows["nspo"]["leak"]) < 1e-6
    run = json.loads((tmp_path / "runs" / "nspo-lr0.001-seed0" / "result.json").read_text())
    assert [p["rollouts"] for p in run["trajectory"]] == [1.0, 2.0]
    rule = SelectionRule()
    assert rule.preference(run["selected"]) == max(rule.preference(p) for p in run["trajectory"])


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGINT))],
)
def test_a_signal_waits_for_what_runs_save_and_begins_nothing_more(number: int, tmp_path: Path) -> None:
    script = Path(pool_jobs.__file__)
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with (tmp_path / "out.txt").open("w") as out:
        parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=out, stderr=out, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "first").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.send_signal(number)
    code = parent.wait(120)
    assert code in ((1, -signal.SIGINT, 130) if number == signal.SIGINT else (128 + number,))
    assert (tmp_path / "first" / "saved").exists()
    assert not (tmp_path / "second").exists()
    assert "the runs save their state" in (tmp_path / "out.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_comparison_that_sigterm_ended_goes_on_in_its_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nspo_lightning", "compare", "--config", str(small_quickstart(tmp_path))]
    command += ["--out", str(tmp_path / "out"), "--methods", "[nspo]", "--seeds", "[0]", "--learning_rates", "[1e-3]"]
    command += ["--steps", "6", "--eval_every", "2", "--text_rows", "2", "--jobs", "1", "--stop_unsafe", "0"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    run = tmp_path / "out" / "runs" / "nspo-lr0.001-seed0"
    log = tmp_path / "out" / "logs" / "nspo-lr0.001-seed0.txt"
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 1200
    while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    parent.terminate()
    printed, _ = parent.communicate(timeout=600)
    assert parent.returncode == 128 + signal.SIGTERM, printed
    said = printed + log.read_text()
    assert "state saved to" in said or "is from before this update" in said, said
    assert not (run / "result.json").exists()
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert step >= 1
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    found = json.loads((run / "result.json").read_text())
    assert [point["steps"] for point in found["trajectory"]] == [2.0, 4.0, 6.0]


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import sys, time, multiprocessing\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from nspo_lightning.compare import pool\n"
        "import os\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    e = ProcessPoolExecutor(1, mp_context=context, initializer=pool._die_with, initargs=(os.getpid(),))\n"
        "    print(e.submit(os.getpid).result(), flush=True)\n"
        "    e.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "pool_job.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "pool_job.py")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{worker}").exists()
