"""One JSON file a part, written whole at each result, so that a part that is cut off leaves what it had.

    python benchmarks/gpu/record.py NAME EXIT_CODE OUT     # closes the file of a part that has ended, however it did

Knows the standard library alone until a device is asked for.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "lightning",
    "accelerate",
    "trl",
    "liger-kernel",
    "flash-attn",
    "triton",
)
ROOT = Path(__file__).resolve().parents[2]
TIMED_OUT = 124  # `timeout`'s exit code; 137 where it had to kill


def versions() -> dict[str, str]:
    """Return the versions of what is installed of `PACKAGES`, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the checkout's commit, with `+` where files were changed since; `COMMIT` says it where git can't."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


class Record:
    """What a part has found so far.

    Args:
        out: Folder of the JSON files.
        part: The file's name.
        about: What stands in it from the start: scale, device, settings.
        seconds: How long the part may take.
    """

    def __init__(self, out: Path, part: str, about: dict[str, Any], seconds: float) -> None:
        self.path, self._begin, self._limit = out / f"{part}.json", time.monotonic(), seconds
        self.content: dict[str, Any] = {
            "part": part,
            "status": "running",
            "commit": commit(),
            "versions": versions(),
            "seconds_allowed": seconds,
            **about,
            "results": {},
        }
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._limit - (time.monotonic() - self._begin)

    def add(self, name: str, values: dict[str, Any]) -> None:
        """Add a result, and write."""
        self.content["results"][name] = values
        print(f"{self.content['part']}: {name}: {json.dumps(values)[:400]}", flush=True)
        self.write()

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]], needs: float = 0.0) -> dict[str, Any] | None:
        """Add what `measure` returns, or why there is nothing.

        Reasons are no time left for `needs` seconds, something that is not there (NotImplementedError), or an error.
        """
        if self.left() < needs:
            self.add(name, {"skipped": f"{self.left():.0f} s left, {needs:.0f} s needed"})
            return None
        begin = time.monotonic()
        try:
            values = measure()
        except NotImplementedError as reason:
            self.add(name, {"skipped": str(reason)})
            return None
        except Exception as error:
            traceback.print_exc()
            self.add(name, {"error": f"{type(error).__name__}: {error}"[:2000], "after_s": time.monotonic() - begin})
            return None
        self.add(name, values)
        return values

    def write(self) -> None:
        """Write the file, whole."""
        self.content["seconds"] = time.monotonic() - self._begin
        _write(self.path, self.content)

    def end(self, status: str, **more: Any) -> None:
        """Write how the part ended."""
        self.content |= {"status": status, **more}
        self.write()


def _write(path: Path, content: dict[str, Any]) -> None:
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def close(part: str, code: int, out: Path) -> str:
    """Note the end of a part that could not do so itself, and return its status."""
    path, log = out / f"{part}.json", out / f"{part}.log"
    content = json.loads(path.read_text()) if path.is_file() else {"part": part, "status": "running", "results": {}}
    if content["status"] == "running":
        content["status"] = "out of time" if code in {TIMED_OUT, 137} else "failed"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        content["error"] = f"exit code {code}; the log ends:\n{text[-2000:]}"
        _write(path, content)
    return str(content["status"])


if __name__ == "__main__":
    print(f"{sys.argv[1]}: {close(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))}")
