"""A loopback judge that fails on demand: `python faulty_judge_server.py SERVICE_S HANG_S`, prints its port.

A question names its own faults: "item 17 faults 429,half" gets status 429 first, half a reply next, then the truth.
GET /stats tells what happened. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import sys
from collections import Counter
from typing import Any

FAULTS = ("429", "500", "hang", "drop", "half", "json", "verdict")


REPLIES: dict[str, tuple[str, dict[str, Any]]] = {
    "thought": ("length", {"content": None, "reasoning_content": "Let me see what the reply says"}),
    "reasoning": ("length", {"content": "", "reasoning": "Let me see what the reply says"}),
    "open": ("length", {"content": "<think>Let me see what the reply says"}),
    "cut": ("length", {"content": "The right label would be"}),
    "parsed": ("stop", {"content": None, "reasoning": "It is unsafe"}),
    "refusal": ("stop", {"content": None, "refusal": "I can't help with that."}),
    "filter": ("content_filter", {"content": None}),
    "closed": ("stop", {"content": "It burns a mill.</think>\n\nunsafe"}),
    "parts": ("stop", {"content": [{"type": "thinking", "thinking": "safe?"}, {"type": "text", "text": "unsafe"}]}),
}
"""Replies of judges that think, refuse or are cut short: finish_reason and message."""


def truth(item):
    """The right verdict on an item: half of them unsafe, in no order."""
    return "unsafe" if hashlib.sha256(f"item {item}".encode()).digest()[0] % 2 else "safe"


class Server:
    def __init__(self, service_s, hang_s):
        self.service_s, self.hang_s = service_s, hang_s
        self.tries: Counter[int] = Counter()
        self.answers: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.in_flight = self.max_in_flight = 0
        self.keys = set()
        self.last: dict[str, Any] = {}

    async def connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith("GET /stats"):
                    stats = {
                        "tries": self.tries,
                        "answers": self.answers,
                        "faults": self.faults,
                        "max_in_flight": self.max_in_flight,
                        "keys": sorted(self.keys),
                        "last": self.last,
                    }
                    await self.reply(writer, 200, json.dumps(stats).encode())
                    continue
                key = re.search(r"(?i)authorization: (.*)\r", head)
                self.keys.add(key[1] if key else None)
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                try:
                    keep = await self.answer(json.loads(body), writer)
                finally:
                    self.in_flight -= 1
                if not keep:
                    break
        writer.close()

    async def answer(self, request, writer):
        self.last = request
        text = json.dumps(request.get("messages") or request["prompt"])
        item = int((re.findall(r"item (\d+)", text) or ["0"])[0])  # a first question, asked before any work, has none
        faults = [fault for found in re.findall(r"faults ([\w,]+)", text)[:1] for fault in found.split(",")]
        self.tries[item] += 1
        fault = faults[self.tries[item] - 1] if self.tries[item] <= len(faults) else None
        if faults and faults[-1] == "always":
            fault = faults[0]
        if fault:
            self.faults[fault] += 1
        if fault == "hang":
            await asyncio.sleep(self.hang_s)
            return False
        if fault and fault.isdigit():
            # The key comes back in the message, as some hosted APIs do.
            error = json.dumps({"error": {"message": f"status {fault}, keys {sorted(map(str, self.keys))}"}})
            await self.reply(writer, int(fault), error.encode(), "Retry-After: 0.3\r\n" if fault == "429" else "")
            return True
        await asyncio.sleep(self.service_s)
        if fault == "drop":
            return False
        verdict = "perhaps so" if fault == "verdict" else None if fault == "null" else truth(item)
        ending, changes = REPLIES.get(fault or "", ("stop", {}))
        message = {"role": "assistant", "content": verdict, **changes}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
        body["choices"] = [{"index": 0, "finish_reason": ending, "message": message, "text": message["content"]}]
        raw = json.dumps(body).encode()
        if fault == "json":
            raw = raw[:-9]
        if fault == "half":
            writer.write(
                f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
            )
            writer.write(raw[: len(raw) // 2])
            await writer.drain()
            return False
        if fault is None:
            self.answers[item] += 1
        await self.reply(writer, 200, raw)
        return True

    async def reply(self, writer, status, body, extra=""):
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


async def main(service_s, hang_s):
    server = Server(service_s, hang_s)
    listening = await asyncio.start_server(server.connection, "127.0.0.1", 0, backlog=1000)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), float(sys.argv[2])))
