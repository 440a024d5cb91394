"""Commands in README and docs are what the command line takes, and the new user's path is walked: all from the text."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import nspo_lightning.callbacks
from examples.real_model import Stop, fetch_model
from nspo_lightning.cli.app import COMMANDS, main
from nspo_lightning.cli.help import JOBS
from nspo_lightning.cli.jobs import CLI, cli_arguments
from nspo_lightning.cli.shipped import prepared, shipped_configs
from nspo_lightning.policy.settings import TOY_PATH
from nspo_lightning.toy.world import rows

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS_US = ("python -m nspo_lightning ", ".venv/bin/python -m nspo_lightning ", "nspo-lightning ")
SHORT = ["--trainer.accelerator=cpu", "--model.sampling.max_new_tokens=20", "--model.general_max_new_tokens=8"]
SMALL = [
    *SHORT,
    "--data.batch_size=4",
    "--data.val_size=4",
    "--data.test_size=4",
    "--trainer.enable_progress_bar=false",
]


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of a text's blocks that run this package, whole and without comments."""
    found = []
    for block in blocks(text, "bash"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            call = line.strip()
            start = next((start for start in RUNS_US if call.startswith(start)), None)
            if start is not None:
                words = shlex.split(call.removeprefix(start).split(" > ")[0], comments=True)
                found.append(shlex.join(word.replace("$s", "0") for word in words))
    return found


def own_recipe() -> str:
    """The few lines for a model folder and two files, as docs/recipes.md has them."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    return blocks(text[text.index("## Your model folder") :], "yaml")[0]


EVERY = list(dict.fromkeys(command for file in TEXTS for command in commands(file.read_text())))


class _Parsed(Exception):
    """Carries a parser out of the command line before it does anything."""


class _OnlyParser(CLI):
    def parse_arguments(self, parser, args):
        raise _Parsed(parser)


@cache
def parser_of(job: str):
    try:
        _OnlyParser(**cli_arguments(job), args=[job])
    except _Parsed as caught:
        parser = caught.args[0]
        parser.exit_on_error = False
        return parser
    raise AssertionError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader would stand: the files that the texts name are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my.yaml").write_text(own_recipe())
    (tmp_path / "changes.yaml").write_text("seed_everything: 1\n")
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    (made,) = [line for line in evidence.splitlines() if line.startswith("sed ") and line.endswith("> attention.yaml")]
    made = made.replace("configs/", f"{ROOT}/configs/")
    subprocess.run(
        ["bash", "-c", made], cwd=tmp_path, check=True
    )  # the configuration that the page has its reader make
    guide = ModuleType("nspo_lightning.callbacks.adapter_norm")  # the file that CONTRIBUTING.md has its reader write
    exec(blocks((ROOT / "CONTRIBUTING.md").read_text(), "python")[0], vars(guide))
    monkeypatch.setitem(sys.modules, guide.__name__, guide)
    monkeypatch.setattr(nspo_lightning.callbacks, "adapter_norm", guide, raising=False)
    return tmp_path


def test_there_are_commands():
    assert len(EVERY) > 25
    assert {command.split()[0] for command in EVERY} >= {*JOBS, *COMMANDS, "completion"} - {"validate", "judge"}


def code_of(call: Callable[[], object]) -> str | int | None:
    """The exit code that a call ends with."""
    try:
        call()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def parse(command: str) -> None:
    """Have a command parsed by the parser that runs it, and nothing else."""
    job, *_ = words = prepared([word.replace("CONFIG", "quickstart") for word in shlex.split(command)])
    if job in JOBS:
        parser_of("warmup" if job == "warmup" else "fit").parse_args(words)
    elif job in ("export", "report", "completion"):
        main([*words, "--help"])
    else:
        main([job, "--help"])
        known = set(re.findall(r"--[\w.]+", main_help(job)))
        assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= known


@cache
def main_help(job: str) -> str:
    """The whole help of a tool."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([job, "--help=all"])
    return said.getvalue()


FIRST = [command for file in (TEXTS[0], ROOT / "docs" / "index.md") for command in commands(file.read_text())]
"""What a new user meets; the others take as long again."""


@pytest.mark.parametrize("command", [pytest.param(c, marks=[] if c in FIRST else pytest.mark.slow) for c in EVERY])
def test_a_command_in_the_texts_is_one_that_the_command_line_takes(folder, command, capsys):
    assert code_of(lambda: parse(command)) == 0, capsys.readouterr().err


def test_a_wrong_option_would_be_found(folder):
    assert code_of(lambda: parse("fit -c quickstart --model.grup_size 4")) == 2


def test_every_configuration_that_is_shipped_is_described():
    recipes = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in shipped_configs() if f"`{name}`" not in recipes] == []


@pytest.fixture
def users_files(folder):
    """The embedded model as a folder of somebody's, which refuses now and then, and rows of its world."""
    shutil.copytree(TOY_PATH, folder / "my-model")
    prompts = [{"prompt": row["prompt"]} for row in rows("harmful", "train")[:32]]
    tasks = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows("general", "train")[:32]]
    for name, found in (("my_prompts", prompts), ("my_tasks", tasks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def run(command: str) -> None:
    words = shlex.split(command)
    assert code_of(lambda: main([*words, *(SMALL if words[0] in JOBS else [])])) == 0, command


def test_the_recipe_for_a_model_folder_and_two_files_is_short_and_runs(users_files):
    assert len(own_recipe().splitlines()) <= 10
    text = (ROOT / "docs" / "recipes.md").read_text()
    start = text.index("## Your model folder")
    told = commands(text[start : text.index("\n## ", start + 1)])
    assert [command.split()[0] for command in told] == ["data", "fit", "report", "export"]
    for command in told:
        run(command)
    name = yaml.safe_load(own_recipe())["name"]
    page = (users_files / "runs" / name / "report.html").read_text()
    assert "<h3>Reward</h3>" in page, "a run of a few steps has curves"
    assert "log_every_n_steps" not in page
    assert (users_files / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_of_a_real_run_in_the_readme_run_one_after_another(users_files):
    """Those that need another extra, or a policy that can be taught to refuse, are left to their own tests."""
    (users_files / "my.yaml").write_text(own_recipe().replace("name: mine", "name: my-run"))
    readme = (ROOT / "README.md").read_text()
    told = commands(readme[readme.index("## A real run") : readme.index("## What a run leaves")])
    chain = ["data", "judge", "calibrate", "fit", "fit", "test", "export"]
    jobs = iter(command.split()[0] for command in told)
    assert all(job in jobs for job in chain), "in this order, with others between them"
    for command in told:
        if command.split()[0] not in ("warmup", "evaluate"):
            run(command)
    beside = re.search(r"`python -m nspo_lightning (report A B)`", readme)
    assert beside is not None
    shutil.copytree(users_files / "runs" / "my-run", users_files / "runs" / "other")
    run(beside[1].replace("A B", "my-run other"))
    assert (users_files / "runs" / "my-run" / "test.json").is_file()
    assert (users_files / "runs" / "my-run" / "predictions.jsonl").is_file()
    assert (users_files / "adapter" / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_command_of_the_landing_page_ends_with_what_it_says(folder, capsys):
    landing = (ROOT / "docs" / "index.md").read_text()
    command = next(command for command in commands(landing) if command.startswith("fit"))
    main(shlex.split(command))
    assert "Held-out prompts, before and after" in capsys.readouterr().out
    summary = json.loads(Path("runs/quickstart/summary.json").read_text())
    assert summary["before/safety/unsafe_rate"] > 0.85
    assert summary["after/safety/unsafe_rate"] < 0.1
    assert abs(summary["after/general/accuracy"] - summary["before/general/accuracy"]) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_runs_on_a_real_model_of_135_million_parameters(users_files):
    """SmolLM2-135M-Instruct, whose one GGUF file makes a folder a model folder."""
    pytest.importorskip("gguf", reason='needs `pip install -e ".[gguf]"`')
    try:
        file = fetch_model(ROOT / "runs" / "real")
    except Stop as error:
        pytest.skip(str(error))
    shutil.rmtree(users_files / "my-model")
    (users_files / "my-model").mkdir()
    (users_files / "my-model" / file.name).symlink_to(file)
    text = (ROOT / "docs" / "recipes.md").read_text()
    start = text.index("## Your model folder")
    few = ["--trainer.limit_train_batches=2", "--data.calibration_size=8", "--trainer.limit_test_batches=1"]
    for command in commands(text[start : text.index("\n## ", start + 1)]):
        run(f"{command} {shlex.join(few)}" if command.startswith("fit") else command)
    page = (users_files / "runs" / "mine" / "report.html").read_text()
    assert "Answers before and after" in page
    assert (users_files / "my-adapter" / "adapter_model.safetensors").is_file()
