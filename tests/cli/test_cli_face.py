"""The first screen of every subcommand, shipped configurations by name, completion, and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nspo_lightning.cli import help as screens
from nspo_lightning.cli import shipped
from nspo_lightning.cli.app import COMMANDS, main

SCREEN = 40


def call(capsys, *arguments):
    code: str | int | None = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", [*screens.JOBS, *COMMANDS, "completion"])
def test_every_help_fits_on_a_screen(capsys, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = call(capsys, name, "--help")
    assert code in {0, None}
    assert not err
    assert out.startswith("usage: ")
    assert name in out.splitlines()[0]
    assert len(out.splitlines()) <= SCREEN
    assert max(len(line) for line in out.splitlines()) <= 120


@pytest.mark.parametrize("name", [*screens.JOBS, *COMMANDS, "completion"])
def test_a_usage_error_names_the_program_as_it_is_called(capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", name])  # what `python -m` leaves there
    code, _, err = call(capsys, name, "--no_such_option", "1")
    assert code == 2
    usage = next(line for line in err.splitlines() if line.startswith("usage: "))
    assert usage.startswith("usage: python -m nspo_lightning ")
    assert f" {name} " in usage
    assert "__main__" not in err


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_help_says_what_can_be_measured(capsys, name):
    assert "best, last, a checkpoint, or an adapter's folder" in call(capsys, name, "--help")[1]


@pytest.mark.parametrize(("typed", "meant"), [("fti", "Did you mean `fit`?"), ("exprot", "`export`"), ("xyz", "")])
def test_an_unknown_subcommand_lists_all_of_them(capsys, typed, meant):
    code, _, err = call(capsys, typed, "-c", "quickstart")
    assert code == 2
    assert meant in err
    assert ("Did you mean" in err) == bool(meant)
    assert all(name in err for name in (*screens.JOBS, *screens.TOOLS))


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_the_overview_names_every_subcommand(capsys, argument):
    code, out, _ = call(capsys, argument)
    assert code == 0
    assert len(out.splitlines()) <= SCREEN
    for name in (*screens.JOBS, *COMMANDS):
        assert f"\n  {name} " in out


def test_help_all_has_every_setting_and_the_screen_invents_none(capsys):
    assert screens.OPTIONS.keys() <= {*screens.JOBS, *COMMANDS}
    for arguments in (
        ("fit", "--help=all"),
        ("calibrate", "--help_all"),
        ("judge", "--help=all"),
        ("compare", "--help=all"),
    ):
        code, out, _ = call(capsys, *arguments)
        assert code == 0
        assert len(out.splitlines()) > SCREEN
        for option in screens.OPTIONS[arguments[0]]:
            if ".optimizer." not in option:  # depends on the optimizer that the config names
                assert f"{option} " in out or f"{option}." in out, option


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['x', 'fit', '--help']\n"
        "from nspo_lightning.__main__ import main; main(); assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_bars_of_libraries_are_a_line_a_minute_in_a_log():
    code = (
        "import sys, time; sys.argv = ['nspo-lightning', '--help']\n"
        "from nspo_lightning.__main__ import main; main()\n"
        "import tqdm\nfor _ in tqdm.tqdm(range(100)): time.sleep(0.01)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stderr.replace("\r", "\n").count("\n100%") == 1
    assert len(told.stderr.replace("\r", "\n").split("\n")) <= 4


def test_the_program_has_the_name_it_is_called_by():
    code = (
        "import sys; sys.argv = ['/usr/bin/nspo-lightning', '--help']\nfrom nspo_lightning.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: nspo-lightning SUBCOMMAND [options]      (or: python -m nspo_lightning ")


def test_a_shipped_config_is_found_by_name_and_a_file_wins(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "fit", "-c", "quickstart", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["name"] == "quickstart"
    Path("quickstart").write_text("name: mine\n")
    code, out, _ = call(capsys, "fit", "--config=quickstart", "--print_config")
    assert code == 0
    assert yaml.safe_load(out)["name"] == "mine"
    assert yaml.safe_load(out)["trainer"]["log_every_n_steps"] == 1, "a run of 40 steps has curves"


def test_an_unknown_config_lists_the_shipped_ones(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "fit", "-c", "quikstart")
    assert code == 2
    assert "quickstart" in err
    assert "Traceback" not in err


def test_every_shipped_config_has_its_name():
    for name, path in shipped.shipped_configs().items():
        assert shipped.find_config(name) == shipped.find_config(f"{name}.yaml") == path
    assert shipped.find_config("folder/quickstart.yaml") == "folder/quickstart.yaml"


def test_exit_codes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "completion", "bash")[0] == 0
    code, _, err = call(capsys, "export", "--ckpt", "none.ckpt", "--out", "out")  # failed
    assert (code, "no checkpoint" in err) == (1, True)
    code, _, err = call(capsys)
    assert (code, "expected a subcommand" in err) == (2, True)
    for wrong in (("nothing",), ("fit", "-c", "quickstart", "--nothing", "1"), ("export",), ("completion", "fish")):
        code, _, err = call(capsys, *wrong)
        assert code == 2, wrong
        assert "Traceback" not in err
    code, _, err = call(capsys, "fit", "-c", "quickstart", "--model.group_size", "1")
    assert (code, "`group_size` must be at least 2" in err) == (1, True)
    assert not list(tmp_path.iterdir())


def test_bash_completes_subcommands_and_options(capsys, tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    code, out, _ = call(capsys, "completion", "bash")
    assert code == 0
    (tmp_path / "completion.sh").write_text(out)
    script = (
        f"source {json.dumps(str(tmp_path / 'completion.sh'))}\n"
        "f=$(complete -p nspo-lightning | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        "COMP_WORDS=(nspo-lightning exp); COMP_CWORD=1; $f; echo ${COMPREPLY[@]}\n"
        "COMP_WORDS=(nspo-lightning fit -c qui); COMP_CWORD=3; $f; echo ${COMPREPLY[@]}\n"
    )
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["export", "quickstart"], result.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    shown = subprocess.Popen(
        [sys.executable, "-m", "nspo_lightning", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert shown.stdout is not None
    assert shown.stderr is not None
    shown.stdout.close()
    assert b"Traceback" not in shown.stderr.read()
    shown.wait()
