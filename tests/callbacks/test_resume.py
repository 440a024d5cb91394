"""Whatever ends a run, and whenever: the same command with `--ckpt_path last` ends where it would have ended."""

from __future__ import annotations

import errno
import os
import random
import signal
from pathlib import Path
from typing import Any, cast

import kill_runs
import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from nspo_lightning import atomic
from nspo_lightning.callbacks.resume.loop_progress import settle
from nspo_lightning.callbacks.resume.random_state import random_state, set_random_state
from nspo_lightning.compat.lightning import BATCHES, COUNTERS, VALIDATION_BATCHES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the small job."""
    root = tmp_path_factory.mktemp("resume")
    kill_runs.write_job(root / "whole")
    assert kill_runs.wait(kill_runs.start(root / "whole")) == 0
    return root / "whole"


@pytest.mark.parametrize(
    ("phase", "occurrence", "number"),
    [
        ("between updates", 5, signal.SIGKILL),
        pytest.param("checkpoint", 9, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("validation", 2, signal.SIGKILL, marks=pytest.mark.slow),
        ("rollout", 3, signal.SIGTERM),
        ("between updates", 4, signal.SIGINT),
        pytest.param("between updates", 6, signal.SIGHUP, marks=pytest.mark.slow),  # a terminal that is closed
    ],
)
def test_a_killed_run_ends_bitwise_where_the_uninterrupted_one_does(
    phase: str, occurrence: int, number: int, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    kill_runs.write_job(folder)
    child = kill_runs.start(folder)
    assert kill_runs.kill_in(child, folder, phase, occurrence, 0.01, number)
    code = kill_runs.wait(child)
    assert code != 0
    if number in (signal.SIGTERM, signal.SIGHUP):
        assert code == 128 + number
    assert "Traceback" not in (folder / "output.log").read_text() or number == signal.SIGKILL
    assert kill_runs.wait(kill_runs.start(folder, "--ckpt_path", "last")) == 0
    assert kill_runs.differences(kill_runs.result(whole), kill_runs.result(folder)) == []
    assert not list(folder.rglob("*.ckpt*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "occurrence", "number"),
    [("between updates", 7, signal.SIGKILL), ("validation", 3, signal.SIGKILL), ("validation", 3, signal.SIGTERM)],
)
def test_a_killed_warm_start_ends_bitwise_too(phase: str, occurrence: int, number: int, tmp_path: Path) -> None:
    """Its one epoch has no end at which Lightning's counts of validation batches would begin anew."""
    found = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        kill_runs.write_job(folder)
        child = kill_runs.start(folder, *kill_runs.warmup_options(), command="warmup")
        if name == "killed":
            assert kill_runs.kill_in(child, folder, phase, occurrence, 0.01, number)
            assert kill_runs.wait(child) != 0
            again = [*kill_runs.warmup_options(), "--ckpt_path", "last"]
            child = kill_runs.start(folder, *again, command="warmup")
        kill_runs.wait(child)
        found[name] = kill_runs.result(folder, "job-warmup")
    assert kill_runs.differences(found["whole"], found["killed"]) == []


def _counts(total: int, current: int) -> dict[str, Any]:
    return {"total": dict.fromkeys(COUNTERS, total), "current": dict.fromkeys(COUNTERS, current)}


def test_a_validation_that_was_run_anew_leaves_no_trace_in_later_checkpoints() -> None:
    """Else Lightning takes a later checkpoint for one within a validation, which it then repeats."""
    fit_loop = {BATCHES: _counts(6, 6), VALIDATION_BATCHES: _counts(4, 1)}
    never = cast("pl.Trainer", None)  # not asked
    settle(fit_loop, never, "validation")  # one of its batches is through
    to_come = {"ready": 4, "started": 4, "processed": 3, "completed": 3}
    assert fit_loop[VALIDATION_BATCHES]["total"] == to_come
    fit_loop[VALIDATION_BATCHES]["total"] = {name: count + 2 for name, count in to_come.items()}  # all of it
    settle(fit_loop, never, "elsewhere")
    assert set(fit_loop[VALIDATION_BATCHES]["total"].values()) == {5}


def test_last_without_a_checkpoint_is_an_error_and_last_if_any_begins(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    kill_runs.write_job(folder)
    assert kill_runs.wait(kill_runs.start(folder, "--ckpt_path", "last")) == 1
    said = (folder / "output.log").read_text()
    assert "expected the run's runs/job/checkpoints/last.ckpt, and it is not there" in said
    assert "Traceback" not in said
    assert not (folder / "runs").exists()
    assert kill_runs.wait(kill_runs.start(folder, "--ckpt_path", "last-if-any")) == 0
    assert "the run begins" in (folder / "output.log").read_text()
    assert kill_runs.differences(kill_runs.result(whole), kill_runs.result(folder)) == []


def test_the_comparison_sees_a_single_bit() -> None:
    a = {"x": [torch.tensor([1.0, 2.0])], "y": 1}
    b = {"x": [torch.nextafter(torch.tensor([1.0, 2.0]), torch.tensor(9.0))], "y": 1}
    assert kill_runs.differences(a, a) == []
    assert kill_runs.differences(a, b) == ["/x/0"]


def test_a_full_disk_ends_a_run_in_one_message(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    kill_runs.write_job(folder)
    written, real_sync, real_fsync = [0], atomic.sync_folder, os.fsync

    def count(folder: Path) -> None:
        written[0] += folder.name == "checkpoints"
        real_sync(folder)

    def fsync(fd: Any) -> None:
        if written[0] >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(fd)

    def fill_the_disk() -> None:  # in the child: it is full once two checkpoints are written
        atomic.sync_folder = count  # type: ignore[assignment]
        os.fsync = fsync  # type: ignore[assignment]

    child = kill_runs.start(folder, before=fill_the_disk)
    assert kill_runs.wait(child) == 1
    text = (folder / "output.log").read_text()
    assert "Traceback" not in text
    assert "No space left on device" in text
    last = torch.load(folder / "runs" / "job" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] >= 1
    assert kill_runs.wait(kill_runs.start(folder, "--ckpt_path", "last")) == 0
    assert kill_runs.differences(kill_runs.result(whole), kill_runs.result(folder)) == []


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


def test_what_a_callback_froze_is_in_the_checkpoint_and_comes_back(whole: Path, tmp_path: Path) -> None:
    kill_runs.write_job(tmp_path / "whole")
    assert kill_runs.wait(kill_runs.start(tmp_path / "whole", "--nullspace.freeze_down", "true")) == 0
    kill_runs.write_job(tmp_path / "cut")
    child = kill_runs.start(tmp_path / "cut", "--nullspace.freeze_down", "true")
    assert kill_runs.kill_in(child, tmp_path / "cut", "checkpoint", 9, 0.01)
    kill_runs.wait(child)
    resumed = kill_runs.start(tmp_path / "cut", "--nullspace.freeze_down", "true", "--ckpt_path", "last")
    assert kill_runs.wait(resumed) == 0
    assert kill_runs.differences(kill_runs.result(tmp_path / "whole"), kill_runs.result(tmp_path / "cut")) == []
