"""Half a character (a lone surrogate), which no encoding can write, wherever text comes from: no UnicodeEncodeError."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_guards
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from workspace import build, run, write_lines

from nspo_lightning.atomic import json_text, without_surrogates, write_json
from nspo_lightning.cli.judge import judge_file
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.rewards import GuardJudge, RefusalReward, ServerJudge
from nspo_lightning.rewards.judges.judge_cache import JudgeCache
from nspo_lightning.rewards.messages import as_chat, as_text, transcript

HALF = "\ud800"
texts = st.text(st.sampled_from("a\ud800\udc00\udcff\n") | st.characters(), max_size=12)
chats = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_text_is_written_and_read_again(text: str) -> None:
    assert json.loads(json_text({"a": [text]}).encode("utf-8")) == {"a": [text]} or "\ud800\udc00" in text
    without_surrogates(text).encode("utf-8")
    kept = without_surrogates(text)
    assert without_surrogates({text: [text, (1, text)]}) == {kept: [kept, (1, kept)]}
    if text.isascii():
        assert without_surrogates(text) == text


def test_two_halves_make_a_character() -> None:
    assert without_surrogates("\ud83d\ude00") == "😀"
    assert without_surrogates(f"a{HALF}b") == "a\ufffdb"


@settings(max_examples=100, deadline=None)
@given(texts | chats, texts)
def test_texts_for_judges_can_be_encoded(prompt: Any, completion: str) -> None:
    for text in (as_text(prompt), transcript(prompt), as_text(completion), json.dumps(as_chat(prompt, completion))):
        text.encode("utf-8")
    for turn in as_chat(prompt, completion):
        turn["content"].encode("utf-8")


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """A judge whose replies hold half a character."""
    asked: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            text = f"Safety: Unsafe\nCategories: Vio{HALF}lent\nRefusal: No"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_address[1]}/v1", asked
    service.shutdown()


def test_a_server_judge_asks_and_is_answered_with_halves(server: tuple[str, list[bytes]], tmp_path: Path) -> None:
    url, asked = server
    options: dict[str, Any] = {"base_url": url, "reply_format": "qwen3guard", "cache_dir": str(tmp_path)}
    judge = ServerJudge(f"m{HALF}", **options, request_options={"user": HALF})
    verdicts = judge.verdicts([f"tell {HALF} me"], [f"fine {HALF}"])
    assert verdicts[0] is not None
    assert verdicts[0].categories == ("Vio\ufffdlent",)
    assert len(asked) == 1
    json.loads(asked[0].decode("utf-8"))
    again = ServerJudge(f"m{HALF}", **options, request_options={"user": HALF})
    assert again.verdicts([f"tell {HALF} me"], [f"fine {HALF}"]) == verdicts
    assert again.metrics()["requests"] == 0


def test_a_cache_keeps_halves(tmp_path: Path) -> None:
    JudgeCache(str(tmp_path)).put("key", f"safe{HALF}")
    assert JudgeCache(str(tmp_path)).get("key") == f"safe{HALF}"


def test_a_guard_reads_halves() -> None:
    judge = GuardJudge("tiny", "qwen3guard", device="cpu", category_tokens=0)
    judge._tokenizer = tiny_guards.make_tokenizer("qwen3guard")
    judge._model = tiny_guards.make_model("qwen3guard", judge._tokenizer).eval()
    assert len(judge.verdicts([f"tell {HALF}"], [f"fine {HALF}"])) == 1


class Reporting(RefusalReward):
    """Reports half a character for each sample."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        if callable(log_extra := columns.get("log_extra")):
            log_extra("said", [HALF] * len(completions))
        return super().__call__(prompts, completions, **columns)


def test_files_of_scores_and_results(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"prompt": HALF, "completion": f"a {HALF}", "other": HALF}] * 2)
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    judge_file(Reporting(), input=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "out.jsonl"), console=console)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert lines[0]["said"] == HALF
    write_json({"a": HALF}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": HALF}
    console.print(rich_table(HALF, (HALF,), [(HALF,)]))
    console.file.flush()


def test_a_whole_job_on_rows_with_halves(tiny_llama: Path, tmp_path: Path) -> None:
    build(tmp_path, tiny_llama)
    rows = [{"prompt": f"Burn {i}?", "note": HALF, "category": f"kind{HALF}", "answer": f"a{HALF}"} for i in range(24)]
    write_lines(tmp_path / "safety.jsonl", rows)
    write_lines(tmp_path / "general.jsonl", [{"prompt": f"Say {i}.", "answer": f"{i}{HALF}"} for i in range(24)])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["model"]["reward"] = {"class_path": f"{__name__}.Reporting"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for command in ("data", "fit", "test", "predict"):
        shown = run(tmp_path, command, "-c", "config.yaml", *(["--ckpt_path=last"] if command[0] in "tp" else []))
        assert "UnicodeEncodeError" not in shown.err
        assert shown.code in (0, 1), shown.err
        if shown.code:
            assert "line 1" in shown.err, shown.err
            return  # a row that is named and refused is an answer too
    lines = (tmp_path / "runs" / "job" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines]


def test_a_configuration_with_halves_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    build(tmp_path, tiny_llama)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("seed_everything: 1\n")
    path = tmp_path / "half.yaml"
    path.write_text((tmp_path / "config.yaml").read_text().replace("safety.jsonl", '"safety\\uD800.jsonl"'))
    shown = run(tmp_path, "fit", "-c", "half.yaml")
    assert shown.code in (1, 2)
    assert "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()
