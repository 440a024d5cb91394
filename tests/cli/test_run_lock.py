"""Two runs of one name: the second is refused, a dead one's lock is taken over, ranks of one run share theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from workspace import build, run, tree

from nspo_lightning.cli.run_folder import RunFolder
from nspo_lightning.cli.run_lock import OLD_S, RunLock, RunLockedError, lock_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> Path:
    build(tmp_path, tiny_llama)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "job"


def another(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs code and then waits."""
    lines = f"import sys, time\nfrom pathlib import Path\n{code}\nprint('ready', flush=True)\ntime.sleep(600)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", lines, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


HOLD = "from nspo_lightning.cli.run_lock import RunLock\nlock = RunLock(Path(sys.argv[1]))\nlock.take()"


def held(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(lock_file(folder).read_text())
    return content


def write(folder: Path, age_s: float = 0.0, **changes: Any) -> None:
    """Leave a lock of another run, made of this process's own."""
    lock = RunLock(folder)
    lock.take()
    content = {**held(folder), **changes}
    lock.release()
    lock_file(folder).write_text(json.dumps(content))
    then = time.time() - age_s
    os.utime(lock_file(folder), (then, then))


def test_a_second_run_is_told_who_has_the_name_and_touches_nothing(job: Path) -> None:
    assert run(job, "fit", "-c", "config.yaml").code == 0
    process = another(HOLD, str(job / "runs" / "job"))
    try:
        before = tree(job)
        for more in ([], ["--ckpt_path=last"]):
            shown = run(job, "fit", "-c", "config.yaml", *more)
            assert shown.code == 1
            assert f"process {process.pid} on " in shown.err
            assert "since 20" in shown.err
            assert "--name" in shown.err
            assert "Traceback" not in shown.err
            assert tree(job) == before
        assert run(job, "fit", "-c", "config.yaml", "--name=another").code == 0
        assert run(job, "validate", "-c", "config.yaml", "--ckpt_path=last").code == 0, "measuring it is allowed"
    finally:
        process.kill()
        process.wait()
    assert run(job, "fit", "-c", "config.yaml").code == 0, "what was killed holds nothing"
    assert not lock_file(job / "runs" / "job").exists()
    assert (job / "runs" / "job.1").is_dir()


def test_two_fits_at_once_leave_one_whole_run(job: Path) -> None:
    config = yaml.safe_load((job / "config.yaml").read_text())
    config["trainer"]["limit_train_batches"] = 4
    config["model"]["max_rollouts_without_signal"] = 0  # a run that learns nothing is none of this test's business
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nspo_lightning", "fit", "-c", "config.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, cwd=job, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    if codes == [0, 0]:  # the machine let one end before the other began: then it was set aside
        assert (job / "runs" / "job.1" / "config.yaml").is_file()
    else:
        assert codes == [0, 1], said
        assert not (job / "runs" / "job.1").exists()
    assert len(list((job / "runs" / "job").glob("events.out*"))) <= 2
    assert not list((job / "runs").glob(".*.lock"))


def test_the_lock_is_let_go_after_a_mistake_and_after_a_bug(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(job, "fit", "-c", "config.yaml", "--data.safety=nothing.jsonl").code == 1
    assert not (job / "runs").exists()
    from nspo_lightning.module.grpo_module import GRPOModule

    def broken(self: GRPOModule, batch: object, batch_idx: int) -> None:
        assert lock_file(job / "runs" / "job").exists()
        [].pop()

    monkeypatch.setattr(GRPOModule, "training_step", broken)
    with pytest.raises(IndexError):
        run(job, "fit", "-c", "config.yaml")
    assert not lock_file(job / "runs" / "job").exists()


def test_taken_once_at_a_time(folder: Path) -> None:
    lock = RunLock(folder)
    lock.take()
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom pathlib import Path\n{HOLD}", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "RunLockedError" in process.stderr
    assert f"process {os.getpid()} on " in process.stderr
    lock.release()
    assert not lock_file(folder).exists()
    RunLock(folder).take()


def test_a_killed_process_leaves_a_lock_that_is_taken_over(folder: Path) -> None:
    process = another(HOLD, str(folder))
    with pytest.raises(RunLockedError, match=f"process {process.pid} on .* since "):
        RunLock(folder).take()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock_file(folder).exists()
    RunLock(folder).take()
    assert held(folder)["pid"] == os.getpid()


def test_a_reused_process_number_is_seen(folder: Path) -> None:
    process = another("")
    try:
        write(folder, pid=process.pid, started="1")
        RunLock(folder).take()
        assert held(folder)["pid"] == os.getpid()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"space": "pid:[1]"}, {"boot": "another"}])
def test_what_cannot_be_seen_from_here_counts_until_nobody_touched_it_for_long(
    elsewhere: dict[str, Any], folder: Path
) -> None:
    write(folder, pid=4_000_000, **elsewhere)
    with pytest.raises(RunLockedError, match=r"process 4000000 on .*another --name"):
        RunLock(folder).take()
    lock_file(folder).unlink()
    write(folder, age_s=OLD_S + 60, pid=4_000_000, **elsewhere)
    RunLock(folder).take()
    assert held(folder)["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_counts_until_it_is_old(content: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    lock_file(folder).write_text(content)
    with pytest.raises(RunLockedError, match=r"\.job\.lock"):
        RunLock(folder).take()
    then = time.time() - OLD_S - 60
    os.utime(lock_file(folder), (then, then))
    RunLock(folder).take()


def test_a_lock_is_touched_while_it_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nspo_lightning.cli.run_lock.TOUCH_S", 0.05)
    lock = RunLock(folder)
    lock.take()
    os.utime(lock_file(folder), (1.0, 1.0))
    deadline = time.monotonic() + 10
    while lock_file(folder).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock_file(folder).stat().st_mtime > 2
    lock.release()


def test_a_lock_that_another_took_over_is_not_removed(folder: Path) -> None:
    lock = RunLock(folder)
    lock.take()
    lock_file(folder).write_text(json.dumps({**held(folder), "pid": 1, "started": "0"}))
    lock.release()
    assert lock_file(folder).exists()


def test_many_at_once_and_one_gets_it(folder: Path) -> None:
    write(folder, pid=4_000_001)  # stale, so all of them want to take it over
    code = (
        "import sys\nfrom pathlib import Path\nfrom nspo_lightning.cli.run_lock import RunLock, RunLockedError\n"
        "go = Path(sys.argv[2])\nprint('ready', flush=True)\nwhile not go.exists(): pass\n"
        "try:\n    RunLock(Path(sys.argv[1])).take()\n    print('mine')\n    sys.stdout.flush()\n"
        "    import time; time.sleep(3)\n"
        "except RunLockedError:\n    print('taken')\n"
    )
    go = folder.parent / "go"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(go)], stdout=subprocess.PIPE, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
        for _ in range(4)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    go.touch()
    said = [process.communicate(timeout=60)[0].strip() for process in started]
    assert sorted(said) == ["mine", "taken", "taken", "taken"]


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "0", "RANK": "1"},
        *(pytest.param(given, marks=pytest.mark.slow) for given in ({"LOCAL_RANK": "1"}, {"RANK": "3"})),
    ],
)
def test_other_ranks_of_a_run_take_no_lock(variables: dict[str, str], folder: Path) -> None:
    RunLock(folder).take()
    code = (
        "import sys\nfrom pathlib import Path\nfrom nspo_lightning.cli.run_folder import RunFolder\n"
        "RunFolder().begin(Path(sys.argv[1]), set_aside=True)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert held(folder)["pid"] == os.getpid()


def test_the_lock_comes_before_the_earlier_run_is_moved(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "last.ckpt").touch()
    process = another(HOLD, str(folder))
    try:
        with pytest.raises(RunLockedError):
            RunFolder().begin(folder, set_aside=True)
        assert tree(folder.parent) == {"job/last.ckpt", ".job.lock"}
    finally:
        process.kill()
        process.wait()
