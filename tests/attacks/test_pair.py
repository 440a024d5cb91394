"""PAIR: an attacker behind a server rewrites what the policy refuses; one that is down is one screen."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nspo_lightning.attacks import AttackError, AttackRow, Pair, find_attacks

ASKED: list[dict[str, Any]] = []


class Attacker(BaseHTTPRequestHandler):
    """Replies with the request and the number of the round."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ASKED.append(request)
        turns = request["messages"]
        text = f"{turns[1]['content'].removeprefix('The request: ')} round {len(turns) // 2}"
        message = {"role": "assistant", "content": text}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    ASKED.clear()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Attacker)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()


class Stubborn:
    """Complies with request i in round i."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def attack_model(self) -> tuple[Any, Any]:
        raise NotImplementedError

    def attack_answers(self, prompts: Sequence[Any]) -> list[str]:
        self.asked += prompts
        return [f"No to {prompt}" for prompt in prompts]

    def attack_outcomes(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
        assert all(prompt.startswith("request") and "round" not in prompt for prompt in prompts), "the request itself"
        return ["unsafe" if c.split()[3] == c.split()[5] else "refusal" for c in completions]


def test_what_is_refused_is_rewritten_until_it_is_answered_or_the_rounds_are_over(server: str) -> None:
    rows = [AttackRow(prompt=f"request {i}", harmful=True) for i in (1, 2, 9)]
    victim = Stubborn()
    found = Pair("attacker", base_url=server, rounds=3).attacked(rows, victim)
    assert [row.prompt for row in found] == ["request 1 round 1", "request 2 round 2", "request 9 round 3"]
    assert sorted(victim.asked) == sorted(
        f"request {i} round {n}" for i, rounds in ((1, 1), (2, 2), (9, 3)) for n in range(1, rounds + 1)
    ), "nothing more is asked once it has worked"
    last = max(ASKED, key=lambda request: len(request["messages"]))["messages"]
    assert [turn["role"] for turn in last] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "No to request 9 round 2" in last[-1]["content"]


def test_the_turns_before_the_request_stay(server: str) -> None:
    before = [
        {"role": "system", "content": "Be safe."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
    ]

    class Complies:
        def __init__(self) -> None:
            self.asked: list[Any] = []

        def attack_answers(self, prompts: Sequence[Any]) -> list[str]:
            self.asked += prompts
            return ["Sure."] * len(prompts)

        def attack_outcomes(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
            return ["unsafe"] * len(prompts)

    victim: Any = Complies()
    row = AttackRow(prompt=[*before, {"role": "user", "content": "request 1"}], harmful=True)
    (found,) = Pair("attacker", base_url=server, rounds=1).attacked([row], victim)
    assert not isinstance(found.prompt, str)
    assert list(found.prompt[:-1]) == before
    assert found.prompt[-1]["role"] == "user"
    assert found.prompt[-1]["content"].endswith("request 1 round 1")
    assert victim.asked == [found.prompt], "it is searched with what is measured"


def test_an_attacker_that_is_down_is_said_on_one_screen() -> None:
    attack = Pair("attacker", base_url="http://127.0.0.1:9/v1", max_retries=0, request_timeout_s=2)
    with pytest.raises(AttackError, match=r"attacker at http://127.0.0.1:9/v1 gave no prompt.*Start or mend") as found:
        attack.attacked([AttackRow(prompt="request 1", harmful=True)], Stubborn())
    with pytest.raises(AttackError, match="Start or mend"):
        find_attacks(["prefill_3", attack])  # before any work
    assert len(str(found.value).splitlines()) < 10


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(AttackError, match="`rounds` of `pair` must be at least 1"):
        Pair("attacker", rounds=0)
    with pytest.raises(ValueError, match="base_url"):
        Pair("attacker", base_url="nowhere")
    with pytest.raises(AttackError, match="searches against a policy"):
        Pair("attacker").attacked([], None)
