"""Whatever ends a run, and whenever: the same command with `--ckpt_path last` ends where it would have ended."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nspo_lightning import atomic
from nspo_lightning.callbacks.resume.random_state import random_state, set_random_state
from nspo_lightning.checkpoints import AtomicCheckpointIO, CheckpointError, remove_leftovers, write_checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.fixture(scope="module")
def trials() -> ModuleType:
    """The script as a module, under the name that its own configuration uses."""
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_and_resume"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(trials: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the small job."""
    root = tmp_path_factory.mktemp("resume")
    trials.write_job(root / "whole")
    assert trials.wait(trials.start(root / "whole")) == 0
    return root / "whole"


@pytest.mark.parametrize(
    ("phase", "occurrence", "number"),
    [
        ("between updates", 5, signal.SIGKILL),
        ("checkpoint", 9, signal.SIGKILL),
        ("validation", 2, signal.SIGKILL),
        ("rollout", 3, signal.SIGTERM),
        ("between updates", 4, signal.SIGINT),
    ],
)
def test_a_killed_run_ends_bitwise_where_the_uninterrupted_one_does(
    phase: str, occurrence: int, number: int, trials: ModuleType, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    trials.write_job(folder)
    child = trials.start(folder)
    assert trials.kill_in(child, folder, phase, occurrence, 0.01, number)
    code = trials.wait(child)
    assert code != 0
    if number == signal.SIGTERM:
        assert code == 143
    assert "Traceback" not in (folder / "output.log").read_text() or number == signal.SIGKILL
    assert trials.wait(trials.start(folder, "--ckpt_path", "last")) == 0
    assert trials.differences(trials.result(whole), trials.result(folder)) == []
    assert not list(folder.rglob("*.ckpt*.partial"))


def test_last_without_a_checkpoint_starts_anew_and_says_so(trials: ModuleType, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    trials.write_job(folder)
    assert trials.wait(trials.start(folder, "--ckpt_path", "last")) == 0
    assert "the run starts anew" in (folder / "output.log").read_text()
    assert trials.differences(trials.result(whole), trials.result(folder)) == []


def test_the_comparison_sees_a_single_bit(trials: ModuleType) -> None:
    a = {"x": [torch.tensor([1.0, 2.0])], "y": 1}
    b = {"x": [torch.nextafter(torch.tensor([1.0, 2.0]), torch.tensor(9.0))], "y": 1}
    assert trials.differences(a, a) == []
    assert trials.differences(a, b) == ["/x/0"]


def test_a_file_is_old_or_new_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(b"old", path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*it takes 3\.0 MB.*before is whole.*--ckpt_path last"):
        write_checkpoint(b"n" * 3_000_000, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_ends_a_run_in_one_message(trials: ModuleType, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    trials.write_job(folder)
    written, real_sync, real_fsync = [0], atomic.sync_folder, os.fsync

    def count(path: Path) -> None:
        written[0] += 1
        real_sync(path)

    def fsync(handle: int) -> None:
        if written[0] >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(handle)

    def fill_the_disk() -> None:  # in the child: it is full once five files are written, the basis and checkpoints
        atomic.sync_folder = count  # type: ignore[assignment]
        os.fsync = fsync  # type: ignore[assignment]

    child = trials.start(folder, before=fill_the_disk)
    assert trials.wait(child) == 1
    text = (folder / "output.log").read_text()
    assert "Traceback" not in text
    assert "No space left on device" in text
    last = torch.load(folder / "runs" / "job" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] >= 1
    assert trials.wait(trials.start(folder, "--ckpt_path", "last")) == 0
    assert trials.differences(trials.result(whole), trials.result(folder)) == []


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
    with pytest.raises(Exception, match="holds code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "planted").exists()


def test_generators_go_on_from_where_they_were() -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()  # leaves half a pair behind
    state = random_state()
    first = (random.random(), np.random.randn(), float(torch.rand(())))
    set_random_state(torch.load(_saved(state), weights_only=True))
    assert (random.random(), np.random.randn(), float(torch.rand(()))) == first


def _saved(state: dict[str, Any]) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_what_a_callback_froze_is_in_the_checkpoint_and_comes_back(
    trials: ModuleType, whole: Path, tmp_path: Path
) -> None:
    trials.write_job(tmp_path / "whole")
    assert trials.wait(trials.start(tmp_path / "whole", "--nullspace.freeze_down", "true")) == 0
    trials.write_job(tmp_path / "cut")
    child = trials.start(tmp_path / "cut", "--nullspace.freeze_down", "true")
    assert trials.kill_in(child, tmp_path / "cut", "checkpoint", 9, 0.01)
    trials.wait(child)
    resumed = trials.start(tmp_path / "cut", "--nullspace.freeze_down", "true", "--ckpt_path", "last")
    assert trials.wait(resumed) == 0
    assert trials.differences(trials.result(tmp_path / "whole"), trials.result(tmp_path / "cut")) == []
