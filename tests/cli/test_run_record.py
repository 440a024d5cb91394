"""What a run keeps: its record, its place, its last state; nothing that comes later rewrites or moves them."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from workspace import build, run, tree

from nspo_lightning.cli.run_folder import RunFolder
from nspo_lightning.cli.run_record import differing, latest_record, next_record
from nspo_lightning.module.grpo_module import GRPOModule


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has ended."""
    folder = tmp_path_factory.mktemp("record")
    build(folder, tiny_llama)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}
    config["model"]["max_rollouts_without_signal"] = 0  # a run that learns nothing is none of these tests' business
    config["trainer"]["limit_train_batches"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = os.umask(0o022)
    try:
        shown = run(folder, "fit", "-c", "config.yaml")
    finally:
        os.umask(before)
    assert shown.code == 0, shown.err
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def test_last_is_the_last_state_and_an_error_where_it_is_not(done: Path) -> None:
    last = torch.load(done / "runs" / "job" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    before = tree(done)
    shown = run(done, "fit", "-c", "config.yaml", "--name=another", "--ckpt_path=last")
    assert shown.code == 1
    assert "expected the run's runs/another/checkpoints/last.ckpt, and it is not there" in shown.err
    assert "Traceback" not in shown.err
    assert tree(done) == before


def test_a_test_that_is_refused_leaves_no_run_of_its_name(done: Path) -> None:
    last, before = done / "runs" / "job" / "checkpoints" / "last.ckpt", tree(done)
    shown = run(done, "test", "-c", "config.yaml", "--name=none", f"--ckpt_path={last}", "--model.policy.lora.r=3")
    assert shown.code == 1
    assert "adapter does not fit this one" in shown.err
    assert tree(done) == before
    assert not (done / "runs" / "none").exists()


def test_best_says_which_callback_it_needs(done: Path) -> None:
    shown = run(done, "predict", "-c", "config.yaml", "--ckpt_path=best")
    assert shown.code == 1
    assert "class_path: lightning.pytorch.callbacks.ModelCheckpoint" in shown.err
    assert "monitor: safety/unsafe_rate" in shown.err


def test_the_record_is_written_once(done: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = done / "runs" / "job" / "config.yaml"
    before = record.read_bytes()
    shown = run(done, "predict", "-c", "config.yaml", "--ckpt_path=last", "--model.optimizer.init_args.lr=0.5")
    assert shown.code == 0, shown.err
    assert record.read_bytes() == before
    assert "lr: 0.5" in (record.parent / "config.predict.yaml").read_text()
    kept = contents(done)
    shown = run(done, "fit", "-c", "config.yaml", "--ckpt_path=last", "--model.optimizer.init_args.lr=0.5")
    assert shown.code == 1
    assert "`model.optimizer.lr` 0.0001 -> 0.5" in shown.err
    assert contents(done) == kept, "a refusal changes nothing"
    more = ("--trainer.max_epochs=2", "--data.seed=7", "--seed_everything=5")
    shown = run(done, "fit", "-c", "config.yaml", "--ckpt_path=last", *more)
    assert shown.code == 0, shown.err
    assert "trainer.max_epochs: 1 -> 2" in caplog.text
    assert "seed_everything: 0 -> 5 (without effect" in caplog.text
    assert record.read_bytes() == before
    assert "max_epochs: 2" in (record.parent / "config.resumed.1.yaml").read_text()
    caplog.clear()
    assert run(done, "fit", "-c", "config.yaml", "--ckpt_path=last", *more, "--trainer.max_epochs=3").code == 0
    assert "trainer.max_epochs: 2 -> 3" in caplog.text
    assert "data.seed" not in caplog.text
    assert (record.parent / "config.resumed.2.yaml").is_file()
    assert latest_record(record.parent) == record.parent / "config.resumed.2.yaml"
    assert next_record(record.parent) == "config.resumed.3.yaml"


def test_a_checkpoint_of_another_run_does_not_make_it_this_one(done: Path) -> None:
    """It goes on in a folder of its own; what stood there is kept as an earlier run."""
    (done / "runs" / "taken").mkdir()
    (done / "runs" / "taken" / "config.yaml").write_text("name: taken\n")
    last = done / "runs" / "job" / "checkpoints" / "last.ckpt"
    more = (f"--ckpt_path={last}", "--name=taken", "--trainer.max_epochs=9")
    shown = run(done, "fit", "-c", "config.yaml", *more)
    assert shown.code == 0, shown.err
    assert (done / "runs" / "taken.1" / "config.yaml").read_text() == "name: taken\n"
    assert "max_epochs: 9" in (done / "runs" / "taken" / "config.yaml").read_text()


def test_settings_that_differ_are_found_wherever_they_stand() -> None:
    saved = {"a": {"b": 1}, "callbacks": [{"x": {"patience": 3}}], "gone": 2, "same": None, "ckpt_path": None}
    now = {"a": {"b": 2, "new": None}, "callbacks": [{"x": {"patience": 5}}], "ckpt_path": "last"}
    assert list(differing(saved, now)) == [("a.b", 1, 2), ("callbacks[0].x.patience", 3, 5), ("gone", 2, None)]
    assert list(differing([1], [1, 2], "list")) == [("list", [1], [1, 2])]


def bug(*_: Any, **__: Any) -> None:
    [].pop()


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def told_to_stop(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)  # Lightning would only note it


@pytest.mark.parametrize("what", [bug, interrupted, told_to_stop])
@pytest.mark.parametrize("where", ["configure_model", "training_step"])
def test_a_fit_that_ends_at_its_start_leaves_the_earlier_run_in_its_place(
    done: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[..., None], where: str
) -> None:
    before = contents(done)
    monkeypatch.setattr(GRPOModule, where, what)
    code = 0
    try:
        code = run(done, "fit", "-c", "config.yaml").code
    except (IndexError, KeyboardInterrupt):
        code = 1
    assert code == (128 + signal.SIGTERM if what is told_to_stop else 1)
    assert contents(done) == before


def test_what_a_failed_run_leaves_beside_its_own_files_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "job"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    one = RunFolder()
    one.begin(folder, set_aside=True)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "notes.of.a.callback").touch()
    one.withdraw()
    assert tree(tmp_path / "runs") == {"job/checkpoints/last.ckpt", "job.2/notes.of.a.callback"}
    one.begin(folder, set_aside=True)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").touch()
    one.withdraw()
    assert (folder / "adapter" / "weights").exists(), "a run with something to keep stays"
    assert (tmp_path / "runs" / "job.1" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["nullspace", "NullSpace"])
def test_no_run_takes_the_place_of_the_calibrations(done: Path, name: str) -> None:
    before = tree(done)
    shown = run(done, "fit", "-c", "config.yaml", f"--name={name}")
    assert shown.code == 1
    assert "that folder is for the calibrations of all runs" in shown.err
    assert tree(done) == before


def test_a_folder_that_holds_other_runs_is_not_moved_out_of_the_way(done: Path) -> None:
    (done / "runs" / "compare" / "commands").mkdir(parents=True)
    (done / "runs" / "compare" / "commands" / "nspo.json").touch()
    before = tree(done)
    shown = run(done, "fit", "-c", "config.yaml", "--name=compare")
    assert shown.code == 1
    assert "runs/compare is there and is no run but holds others (`commands` is in it)" in shown.err
    assert "Traceback" not in shown.err
    assert tree(done) == before


def test_a_run_without_a_logger_has_a_folder_of_its_own(done: Path) -> None:
    bases = tree(done / "runs" / "nullspace")
    shown = run(done, "fit", "-c", "config.yaml", "--name=plain", "--trainer.logger=false")
    assert shown.code == 0, shown.err
    left = tree(done / "runs" / "plain")
    assert {"config.yaml", "summary.json", "checkpoints/last.ckpt", "adapter/adapter_config.json"} <= left
    assert tree(done / "runs" / "nullspace") == bases, "the calibration was found"
    assert (
        run(done, "validate", "-c", "config.yaml", "--name=plain", "--trainer.logger=false", "--ckpt_path=last").code
        == 0
    )


def test_every_file_is_as_readable_as_any_new_one(done: Path) -> None:
    export = ("export", f"--ckpt={done / 'runs' / 'job' / 'checkpoints' / 'last.ckpt'}")
    before = os.umask(0o022)
    try:
        assert run(done, *export, f"--out={done / 'out' / 'adapter'}").code == 0
        assert run(done, *export, f"--out={done / 'out' / 'merged'}", "--merge").code == 0
    finally:
        os.umask(before)
    for place in ("runs/job", "runs/nullspace", "out"):
        files = [path for path in (done / place).rglob("*") if path.is_file()]
        assert files
        private = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o044 != 0o044]
        assert not private, place


def test_the_adapter_of_a_run_has_the_card_of_an_export(done: Path) -> None:
    card = (done / "runs" / "job" / "adapter" / "README.md").read_text()
    assert "More Information Needed" not in card
    for wanted in ("## Before and after", "safety/answered_rate", "PeftModel", "RefusalReward", "Certificate"):
        assert wanted in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
