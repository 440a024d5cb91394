"""Judgements by content: within a run in memory, across runs in a folder if one is named.

The folder holds hashes and replies, never a prompt, a completion or a key. Each process appends to a file of its own,
so ranks and runs can share a folder (also on network disks); a line that a crash tore is skipped when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nspo_lightning.atomic import json_text


def content_key(request: Mapping[str, Any]) -> str:
    """Name a request by all that decides its answer (model, messages, ...): the SHA-256 of its canonical JSON."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class JudgeCache:
    """Replies by content key.

    Args:
        folder: Where replies are kept across runs; nowhere by default.
        max_entries: How many are held in memory; the least recently used go first.
    """

    def __init__(self, folder: str | None = None, max_entries: int = 200_000) -> None:
        if max_entries < 1:
            raise ValueError(f"`max_entries` must be at least 1, got {max_entries}.")
        self.folder = Path(folder) if folder else None
        self.max_entries = max_entries
        self._replies: OrderedDict[str, str] = OrderedDict()
        self._file: TextIO | None = None
        self._pid = 0
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("judgements-*.jsonl")):
                self._read(path)

    def __len__(self) -> int:
        return len(self._replies)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def get(self, key: str) -> str | None:
        """Look a reply up by its `content_key`; None if it is not known."""
        reply = self._replies.get(key)
        if reply is not None:
            self._replies.move_to_end(key)
        return reply

    def put(self, key: str, reply: str) -> None:
        """Keep a reply under its `content_key`."""
        if key in self._replies:
            return
        self._remember(key, reply)
        if self.folder is not None:
            file = self._own_file(self.folder)
            file.write(json_text({"key": key, "reply": reply}) + "\n")
            file.flush()

    def _remember(self, key: str, reply: str) -> None:
        self._replies[key] = reply
        if len(self._replies) > self.max_entries:
            self._replies.popitem(last=False)

    def _own_file(self, folder: Path) -> TextIO:
        if self._file is None or self._pid != os.getpid():  # a fork must not share its parent's file
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"judgements-{uuid.uuid4().hex[:12]}.jsonl").open("a", encoding="utf-8")
            self._pid = os.getpid()
        return self._file

    def _read(self, path: Path) -> None:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    key, reply = entry["key"], entry["reply"]
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash: asked again
                if isinstance(key, str) and isinstance(reply, str):
                    self._remember(key, reply)
