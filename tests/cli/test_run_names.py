"""A run's name is one folder in runs/: nothing outside runs/<name> is ever moved, made or removed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from workspace import Shown, build, run, tree, write_lines

from nspo_lightning.cli.export import check_out
from nspo_lightning.cli.run_folder import RunFolder, own_folder, run_folder

NO_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "../../x",
    "a/b",
    "a/",
    "/etc/x",
    "a\\b",
    "a\0b",
    "a\nb",
    " ",
    "...",
    " . ",
    " a",
    "a ",
    ".hidden",
    "$HOME",
    "${X}",
    "a::b",
    "n" * 256,
    "ä" * 128,
    "a\ud800",
]
NAMES = ["job", "x.1", "lr=1e-5,seed=0", "dürre Zeit", "a..b", "~", "C-3PO_v2+x@y", "実験"]


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("above") / "work"
    folder.mkdir()
    build(folder, tiny_llama)
    for name in ("job", "other"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "kept.txt").write_text(name)
    return folder


def refused(shown: Shown) -> None:
    assert shown.code in (1, 2), shown.out
    assert "Traceback" not in shown.err
    assert "`--name`" in shown.err or "`name`" in shown.err, shown.err
    assert "one folder in runs/" in shown.err


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused_with_the_cure(name: str) -> None:
    with pytest.raises(ValueError, match=r"`--name`.*one folder in runs/.*such as"):
        run_folder(name)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken_as_they_are(name: str) -> None:
    assert run_folder(name) == Path("runs") / name
    assert run_folder(None) == Path("runs") / "nspo"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "$HOME", "a\0b"])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_job_refuses_the_name_before_anything_is_touched(command: str, name: str, job: Path) -> None:
    before = tree(job.parent)
    refused(run(job, command, "-c", "config.yaml", f"--name={name}"))
    assert tree(job.parent) == before


@pytest.mark.parametrize("command", ["test", "predict", "calibrate", "data"])
def test_every_job_refuses_it(command: str, job: Path) -> None:
    before = tree(job.parent)
    refused(run(job, command, "-c", "config.yaml", "--name=../x"))
    assert tree(job.parent) == before


def test_evaluate_refuses_it(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nspo_lightning.cli.evaluate._task_manager", lambda: pytest.fail("too late"))
    refused(run(job, "evaluate", "-c", "config.yaml", "--tasks=x", "--name=../x"))
    (job / "named.yaml").write_text((job / "config.yaml").read_text().replace("name: job", "name: ../x"))
    refused(run(job, "evaluate", "-c", "named.yaml", "--tasks=x"))


def test_an_output_is_a_file_and_not_what_is_read(job: Path) -> None:
    write_lines(job / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    (job / "reward.yaml").write_text("reward: {class_path: nspo_lightning.rewards.RefusalReward}\n")
    before = (job / "rows.jsonl").read_text()
    for output in (".", "runs", "rows.jsonl", "./runs/../rows.jsonl", "a\0b", ""):
        shown = run(job, "judge", "-c", "reward.yaml", "--input=rows.jsonl", f"--output={output}")
        assert shown.code in (1, 2), output
        assert "`--output`" in shown.err, shown.err
        assert "Traceback" not in shown.err
        assert (job / "rows.jsonl").read_text() == before


def test_other_outputs_are_looked_at_before_the_work(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in (".", "runs", ""):
        shown = run(job, "calibrate", "-c", "config.yaml", f"--out={out}")
        assert shown.code == 1
        assert "`--out` must be a file" in shown.err, shown.err
    (job / "config.json").touch()
    monkeypatch.chdir(job)
    with pytest.raises(ValueError, match="leaves it alone"):
        check_out(Path("."), Path("elsewhere/last.ckpt"), overwrite=True)


def test_a_run_without_a_logger_does_not_move_all_runs(job: Path) -> None:
    for _ in range(2):
        assert run(job, "fit", "-c", "config.yaml", "--trainer.logger=false").code == 0
        assert (job / "runs" / "other" / "kept.txt").read_text() == "other"
        assert not (job / "runs.1").exists()


def test_a_logger_of_ones_own_does_not_move_what_is_no_run_of_its_own(job: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
    for where in ({"save_dir": "runs", "name": ""}, {"save_dir": ".", "name": ".."}, {"save_dir": "runs", "name": "."}):
        before = tree(job.parent) - {""}
        given = {**logger, "init_args": {**where, "version": ""}}
        run(job, "fit", "-c", "config.yaml", f"--trainer.logger={json.dumps(given)}")
        assert before <= tree(job.parent), where
        assert not (job.parent / "runs.1").exists()
        assert not (job / "runs.1").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from("ab./\\~ $:\0\n*é\ud800{}HOME"), max_size=12) | st.text(max_size=300))
@example("../runs.1")
@example("job/../other")
def test_whatever_a_name_is_nothing_else_is_touched(name: str) -> None:
    top = Path(tempfile.mkdtemp())
    here = Path.cwd()
    work = top / "work"
    try:
        for kept in ("work/runs/job", "work/runs/other", "x", "work/a"):
            (top / kept).mkdir(parents=True)
            (top / kept / "config.yaml").write_text(kept)
        before = {p for p in top.rglob("*") if p.is_file()}
        os.chdir(work)
        try:
            folder = run_folder(name)
        except ValueError:
            return
        assert folder.parent == Path("runs")
        assert len(folder.parts) == 2
        for _ in range(2):
            one = RunFolder()
            one.begin(folder, set_aside=True)
            folder.mkdir(parents=True)
            (folder / "model.ckpt").write_text("x")
            one.end()
        lost = {p for p in before if not p.exists()}
        assert all(p.relative_to(work / "runs").parts[0] == name for p in lost)
        others = {p.relative_to(work / "runs").parts[0] for p in (work / "runs").rglob("*")} - {"job", "other"}
        assert all(other.startswith(name) for other in others), others
    finally:
        os.chdir(here)
        shutil.rmtree(top)


def test_a_folder_of_its_own_lies_in_the_place_of_runs(tmp_path: Path) -> None:
    assert own_folder(str(tmp_path / "runs" / "x"), str(tmp_path / "runs")) == tmp_path / "runs" / "x"
    for shared in (tmp_path / "runs", tmp_path, tmp_path / "runs" / ".." / "x", tmp_path / "runs" / "x" / ".."):
        assert own_folder(str(shared), str(tmp_path / "runs")) is None
