"""Checkpoints are found by their words, are there whole or not at all, and are read as data."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nspo_lightning.atomic import remove_leftovers, replacing, replacing_folder
from nspo_lightning.checkpoints import (
    AtomicCheckpointIO,
    CheckpointError,
    best_of,
    find_checkpoint,
    last_in,
    write_checkpoint,
)


def test_what_ckpt_path_means(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="not there"):
        find_checkpoint("last", tmp_path)
    folder.mkdir()
    torch.save({"callbacks": {"a": {"monitor": None, "best_model_path": "x"}}}, folder / "last.ckpt")
    assert find_checkpoint("last", tmp_path) == folder / "last.ckpt"
    with pytest.raises(CheckpointError, match="none is the best"):
        find_checkpoint("best", tmp_path)
    state = {"monitor": "guard/score", "best_model_path": "elsewhere/best-3.ckpt"}
    torch.save({"callbacks": {"a": {"monitor": None}, "b": state}}, folder / "last.ckpt")
    (folder / "best-3.ckpt").write_text("")
    assert find_checkpoint("best", tmp_path) == folder / "best-3.ckpt"
    with pytest.raises(CheckpointError, match="folder without"):
        find_checkpoint(str(folder), tmp_path)


def test_the_last_is_the_newest_of_its_name(tmp_path: Path) -> None:
    """`ModelCheckpoint` numbers a last checkpoint whose name is taken, and Lightning goes on from the newest."""
    folder = tmp_path / "checkpoints"
    assert last_in(folder) is None
    folder.mkdir()
    (folder / "latest.ckpt").touch()
    assert last_in(folder) is None
    for age, name in ((1, "last-v1.ckpt"), (3, "last.ckpt"), (2, "last-v2.ckpt")):
        torch.save({"callbacks": {}}, folder / name)
        os.utime(folder / name, (1_000_000 - age, 1_000_000 - age))
    assert last_in(folder) == folder / "last-v1.ckpt"
    assert find_checkpoint("last", tmp_path) == folder / "last-v1.ckpt"
    (folder / "last.ckpt").unlink()
    assert find_checkpoint("last", tmp_path) == folder / "last-v1.ckpt"


def test_the_best_is_that_of_the_last_callback_with_a_monitor_and_a_file(tmp_path: Path) -> None:
    for name in ("first.ckpt", "second.ckpt"):
        (tmp_path / name).touch()
    states: list[Any] = [
        {"monitor": "a", "best_model_path": str(tmp_path / "first.ckpt")},
        {"monitor": "b", "best_model_path": str(tmp_path / "second.ckpt")},
        {"monitor": "c", "best_model_path": "gone.ckpt"},
        {"monitor": None, "best_model_path": str(tmp_path / "first.ckpt")},
        "no state",
    ]
    assert best_of(states) == tmp_path / "second.ckpt"
    assert best_of(states[:1]) == tmp_path / "first.ckpt"
    assert best_of(states[2:]) is None


def test_a_file_is_old_or_new_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(b"old", path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*it takes 3\.0 MB.*before is whole.*--ckpt_path last"):
        write_checkpoint(b"n" * 3_000_000, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe")
    with pytest.raises(OSError, match="no ordinary file"), replacing(path) as partial:
        partial.write_text("new")
    assert path.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_is_old_or_new_whatever_happens(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("old")
        assert not (tmp_path / "out").exists()

    def interrupted() -> None:
        with replacing_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out" / "file").read_text() == "old"
    killed = tmp_path / f".out.{os.getpid()}.partial"  # by a process that had this one's number
    killed.mkdir()
    (killed / "other").write_text("half")
    with replacing_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
        (folder / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_leftovers_of_dead_processes_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for number in (dead, os.getppid()):
        (tmp_path / f".last.ckpt.{number}.partial").touch()
    (tmp_path / "last.ckpt").touch()
    assert [p.name for p in remove_leftovers(tmp_path)] == [f".last.ckpt.{dead}.partial"]
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_a_checkpoint_is_read_as_weights_and_nothing_else(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "planted",))

    torch.save({"state_dict": {}, "x": Planted()}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="holds code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "planted").exists()
