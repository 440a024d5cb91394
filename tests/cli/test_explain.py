"""Mistakes in a configuration: the setting, its file and line, what was probably meant, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from workspace import build, run

from nspo_lightning import __version__
from nspo_lightning.cli.errors import is_users_mistake, located, message_for
from nspo_lightning.cli.explain import near
from nspo_lightning.cli.given import Given, remember

JUDGE = {"class_path": "nspo_lightning.rewards.ServerJudge", "init_args": {"model": "m"}}


def judged(**changes: Any) -> dict[str, Any]:
    judge = {**JUDGE, **changes}
    return {"class_path": "nspo_lightning.rewards.OutcomeReward", "init_args": {"judge": judge}}


CASES: dict[str, tuple[str, Any, str, str]] = {
    # what is set to what, which line of the file is named (by a word in it), and what is said of it
    "a setting": ("model.grup_size", 4, "grup_size", "Did you mean `model.group_size`"),
    "a nested setting": ("model.policy.pth", "x", "pth", "Did you mean `model.policy.path`"),
    "a setting of settings": ("model.policy.lora", {"rnak": 4}, "rnak", "LoraSettings has no such setting.*mean `r`"),
    "a setting without its section": ("group_size", 4, "group_size: 4", "Did you mean `model.group_size`"),
    "a section": ("modl", {"group_size": 4}, "modl", "`modl` .*Did you mean `model`"),
    "a source's setting": ("data.general", [{"pth": "general.jsonl"}], "pth", "PromptSource has .*mean `path`"),
    "a source's setting beside the sources": (
        "data.bad_rows",
        "drop",
        "bad_rows",
        "`data.bad_rows` .*a setting of a source, as in `data.safety: {path: ..., bad_rows: ...}`",
    ),
    "a callback's setting": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitr": "x"}}],
        "monitr",
        "EarlyStopping has no such setting. Did you mean `monitor`",
    ),
    "an optimizer's setting": (
        "model.optimizer",
        {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}},
        "lrr",
        "AdamW has no such setting. Did you mean `lr`",
    ),
    "a setting of a class in a class": (
        "model.reward",
        judged(init_args={"model": "m", "treshold": 3}),
        "treshold",
        "`model.reward.judge.treshold` .*ServerJudge has .*mean `threshold`",
    ),
    "a class": (
        "trainer.callbacks",
        [{"class_path": "nspo_lightning.callbacks.CapabilityGard"}],
        "CapabilityGard",
        "has no 'CapabilityGard'. Did you mean `nspo_lightning.callbacks.CapabilityGuard`",
    ),
    "a class in a class": (
        "model.reward",
        judged(class_path="nspo_lightning.rewards.ServerJudg"),
        "ServerJudg",
        "Did you mean `nspo_lightning.rewards.ServerJudge`",
    ),
    "a class without its module": ("model.reward", "RefuselReward", "RefuselReward", "nspo_lightning.rewards.RefusalR"),
    "a module": (
        "model.reward",
        "nspo_lightnin.rewards.RefusalReward",
        "lightnin.",
        "mean `nspo_lightning.rewards.Ref",
    ),
    "a choice": ("model.objective.loss_type", "drgrpo", "drgrpo", "one of grpo, .*Did you mean `dr_grpo`"),
    "a number for settings": ("model.dynamic_sampling", 4, "dynamic", "dynamic_sampling.max_factor 4`"),
    "text for a number": ("model.group_size", "four", "four", "expected a whole number, got 'four'"),
    "text for a number or nothing": (
        "trainer.max_epochs",
        "x",
        "max_epochs",
        "expected a whole number or null, got 'x'",
    ),
    "text for a number in a class in a class": (
        "model.reward",
        judged(init_args={"model": "m", "threshold": "high"}),
        "threshold",
        "`model.reward.judge.threshold` .*expected a number, got 'high'",
    ),
    "what a check refuses": ("model.group_size", 1, "group_size", "`group_size` .*must be at least 2, got 1"),
}


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    build(folder, tiny_llama)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_in_a_file_is_named_by_its_line_and_what_was_meant(name: str, job: Path) -> None:
    key, value, word, says = CASES[name]
    config = yaml.safe_load((job / "config.yaml").read_text())
    *above, last = key.split(".")
    section = config
    for part in above:
        section = section.setdefault(part, {})
    section[last] = value
    text = yaml.safe_dump(config)
    (job / "typed.yaml").write_text(text)
    line = 1 + next(i for i, one in enumerate(text.splitlines()) if word in one)
    shown = run(job, "fit", "-c", "typed.yaml")
    errors = [one for one in shown.err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1, shown.err
    assert f"(typed.yaml, line {line})" in errors[0]
    assert re.search(says, errors[0]), errors[0]
    for noise in ("Union", "<class", "NestedArg", "Namespace", "Traceback"):
        assert noise not in shown.err
    assert shown.err.count("\n") < 12


@pytest.mark.parametrize("setting", ["data.bad_rows", "data.batch_sise", "model.grup_size", "model.policy.pth"])
def test_a_job_that_is_called_like_a_section_names_settings_in_full(setting: str, job: Path) -> None:
    section, name = setting.rsplit(".", 1)
    config = yaml.safe_load((job / "config.yaml").read_text())
    inner = config
    for part in section.split("."):
        inner = inner.setdefault(part, {})
    inner[name] = 1
    (job / "typed.yaml").write_text(yaml.safe_dump(config))
    (error,) = [line for line in run(job, "data", "-c", "typed.yaml").err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: `{setting}` (typed.yaml, line "), error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model.grup_size", "4"), "`--model.grup_size`: .*Did you mean `--model.group_size`"),
        (("--group_size", "4"), "Did you mean `--model.group_size`"),
        (("--model.policy.lora.rnak", "4"), "mean `r`"),
        (("--model.optimizer=torch.optim.AdamX",), r"torch.optim has no 'AdamX'. Did you mean `torch.optim.Adam"),
        (("--model.dynamic_sampling", "4"), "Did you mean `--model.dynamic_sampling.max_factor 4`"),
        (("stray",), "`stray` stands behind no option"),
    ],
)
def test_a_mistake_on_the_command_line_is_no_mistake_of_the_file(
    arguments: tuple[str, ...], says: str, job: Path
) -> None:
    shown = run(job, "fit", "-c", "config.yaml", *arguments)
    assert shown.code == 2
    assert re.search(says, shown.err), shown.err
    assert "config.yaml, line" not in shown.err


def test_what_is_missing_is_named_as_it_is_written(job: Path) -> None:
    shown = run(job, "fit")
    assert "`model.reward`, `data.safety`, `data.general`: expected a value, and found none." in shown.err
    assert "`--model.reward VALUE`" in shown.err


def test_the_last_file_that_says_something_is_the_one_that_counts(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model:\n  group_size: 4\n  policy:\n    path: x\n")
    (tmp_path / "two.yaml").write_text("# more\nmodel:\n  group_size: 5\n")
    given = Given(("fit", "-c", "one.yaml", "--config=two.yaml", "--model.policy.path=y"), tmp_path)
    assert str(given.place(("model", "group_size"))) == "two.yaml, line 3"
    assert given.place(("model", "policy", "path")) is None, "the command line says it"
    assert given.place_of_name("group_size") is None, "two places, either could be meant"
    assert given.place(("model", "nothing")) is None


def test_a_check_names_the_line_of_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("model:\n  objective:\n    beta: -1\n")
    remember(["fit", "-c", "my.yaml"])
    assert (
        located("`objective.beta` must not be negative.") == "`objective.beta` (my.yaml, line 3) must not be negative."
    )
    assert located("Nothing was learnt: `beta`") == "Nothing was learnt: `beta`"
    remember(["fit", "-c", "my.yaml", "--model.objective.beta", "-1"])
    assert located("`objective.beta` is negative.") == "`objective.beta` is negative."


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'openai'", name="openai_not_here"), "pip install openai_not_here"),
        (
            ModuleNotFoundError("Requirement 'wandb>=0.12' not met. HINT: `pip install -U wandb`"),
            "pip install -U wandb",
        ),
        (PermissionError(13, "Permission denied", "/locked/runs"), "'/locked/runs' may not be read or written"),
        (
            OSError(30, "Read-only file system", "/image/runs"),
            "'/image/runs' is on a file system that can only be read",
        ),
        (NotADirectoryError(20, "Not a directory", "a.yaml/runs"), "'a.yaml/runs' is in the way"),
        (ConnectionError("Couldn't reach 'gsm8k'\nmore"), "could not be fetched.*Couldn't reach 'gsm8k'\n"),
        (MisconfigurationException("\n".join(map(str, range(99)))), "... and 81 lines more"),
    ],
)
def test_what_is_no_bug_is_a_message_of_one_screen(error: Exception, says: str) -> None:
    assert is_users_mistake(error)
    told = message_for(error)
    assert re.search(says, told, re.DOTALL), told
    assert told.count("\n") <= 20


def test_what_is_a_bug_stays_one() -> None:
    assert not is_users_mistake(ModuleNotFoundError("x", name="nspo_lightning.nothing"))
    assert not is_users_mistake(ModuleNotFoundError("x", name="json.nothing"))
    assert not is_users_mistake(KeyError("x"))


def test_names_that_others_use_are_known() -> None:
    assert near("rank", ["r", "alpha"]) == "r"
    assert near("rnak", ["r", "alpha"]) == "r"
    assert near("learning_rate", ["lr", "betas"]) == "lr"
    assert near("xyz", ["r", "alpha"]) is None


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from nspo_lightning.cli.app import main

    for option in ("--version", "-V"):
        main([option])
        assert capsys.readouterr().out.strip() == f"nspo-lightning {__version__}"
