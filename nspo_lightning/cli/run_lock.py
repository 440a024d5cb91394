"""One training at a time in a run's folder: a lock file beside it that says who is in there.

The file `.NAME.lock` is made by one process at most (O_EXCL), is touched while the run lives, and is removed at its
end. What a killed run leaves is taken over: at once, where this machine can see that the process is gone or that its
number now belongs to another one; else (another machine or container, a file that can't be read) once nobody has
touched it for `OLD_S`. Only `fit` locks. Whatever measures a run may do so while it is trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

TOUCH_S = 30.0
"""Time between two touches of a lock that is held."""
OLD_S = 900.0
"""A lock of a process that can't be seen from here is dead after so long without a touch."""


class RunLockedError(ValueError):
    """Another run is in the folder."""


def lock_file(folder: Path) -> Path:
    """Return where the lock of a run's folder lies."""
    return folder.with_name(f".{folder.name}.lock")


class RunLock:
    """The lock of a run's folder; `take` and `release` it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder.absolute(), lock_file(folder.absolute())
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the lock, over from a run that is dead; RunLockedError if one is alive."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        while not self._make():
            self._remove_dead()
        threading.Thread(target=self._touch, args=(TOUCH_S,), daemon=True).start()

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if _is_own(_read(self._file)):
                self._file.unlink()

    def _make(self) -> bool:
        try:
            handle = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps({**_whoami(), "since": datetime.now().astimezone().isoformat(" ", "seconds")}))
        return True

    def _remove_dead(self) -> None:
        """Remove the lock if its run is dead. Only one process may at a time: the next would remove a new lock."""
        try:
            with self._file.open("rb+") as file, _alone(file.fileno()):
                if not os.path.samestat(os.fstat(file.fileno()), self._file.stat()):
                    return  # another one was faster: look again
                if not self._is_dead():
                    raise RunLockedError(self._message())
                self._file.unlink()
        except FileNotFoundError:
            return

    def _is_dead(self) -> bool:
        owner, here = _read(self._file), _whoami()
        if owner is not None and all(owner.get(key) == here[key] for key in ("host", "boot", "space")):
            return _is_own(owner) or _started(owner["pid"]) is None or _started(owner["pid"]) != owner.get("started")
        return self._now() - self._file.stat().st_mtime > OLD_S

    def _now(self) -> float:
        """Read the clock that the lock's time is of: a network folder's server has its own."""
        probe = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _message(self) -> str:
        owner = _read(self._file) or {}
        who = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}" if owner else "a run"
        return (
            f"The run `{self._folder.name}` is being trained ({who}). Give this one another --name, or stop the other. "
            f"If there is none (its machine went down), remove {self._file}; untouched for {OLD_S / 60:g} minutes, it "
            "counts for nothing."
        )

    def _touch(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            with contextlib.suppress(OSError):
                if not _is_own(_read(self._file)):
                    return
                os.utime(self._file)


def _whoami() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "boot": _system_text("/proc/sys/kernel/random/boot_id"),
        "space": _process_numbers(),
    }


def _is_own(owner: dict[str, Any] | None) -> bool:
    here = _whoami()
    return owner is not None and all(owner.get(key) == value for key, value in here.items())


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else None


def _started(pid: int) -> str | None:
    """Say when a process of this machine began, in the system's own words; None if it is not there."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        pass  # it is there, and another user's
    after_name = _system_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if after_name[:1] in (["Z"], ["X"]):  # dead, though nobody has asked how it ended
        return None
    return after_name[19] if len(after_name) > 19 else ""


def _process_numbers() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _system_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _alone(handle: int) -> Any:
    try:
        import fcntl
    except ImportError:  # no such thing on this system
        yield
        return
    with contextlib.suppress(OSError):  # nor on this file system
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield  # closing the file lets go
