"""A real peer: `transformers serve` with a tiny guard, asked by the judge's client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_guards
from tiny_guards import TRAINED

from nspo_lightning.rewards import GuardJudge, OutcomeReward, RewardError, RewardSet, ServerJudge

pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
START_LIMIT_S = 300


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(model folder, base url) of a running `transformers serve`."""
    folder = tmp_path_factory.mktemp("qwen3guard")
    tiny_guards.save_guard("qwen3guard", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--device", "cpu"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.perf_counter() + START_LIMIT_S
        while time.perf_counter() < deadline and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            time.sleep(0.3)
        else:
            pytest.fail(f"transformers serve did not start:\n{log.read_text()[-2000:]}")
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_served_guard_says_what_the_local_one_says(peer):
    folder, url = peer
    served = ServerJudge(folder, url, reply_format="qwen3guard", concurrency=2, request_timeout_s=120)
    prompts, completions = zip(*TRAINED, strict=True)
    result = RewardSet([OutcomeReward(served, name="served")])(prompts, completions)
    local = GuardJudge(folder, "qwen3guard", device="cpu")
    expected = [-1.0 if outcome == "unsafe" else 0.0 for outcome in local.classify(prompts, completions)]
    assert result.total.tolist() == expected
    assert set(expected) == {-1.0, 0.0}
    assert [v and v.categories for v in served.verdicts(prompts, completions)] == [
        v.categories for v in local.verdicts(prompts, completions)
    ]
    assert served.metrics()["requests"] == len(TRAINED)  # the second round came from the cache
    assert served.metrics()["errors"] == 0


def test_a_model_that_is_not_served_is_one_clear_error(peer):
    with pytest.raises(RewardError, match="Judge 'server_judge' \\(no/such-model at .*\\) failed: status 4"):
        ServerJudge("no/such-model", peer[1], max_retries=0, request_timeout_s=120).classify(["q"], ["a"])
