"""Keys that are planted wherever a setting is free: refused before the run, and in nothing that is left or shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from workspace import build, run

from nspo_lightning.keys import check_address, check_no_key, holds_key, mask_keys
from nspo_lightning.policy.identity import describe

WORD = "Plant3dS3cr3t"  # says nothing by itself: the field's name does
NAMES = ["api_key", "apikey", "APIKEY", "x-api-key", "X-Api-Key", "token", "access_token", "bearer", "authorization",
         "Authorization", "secret", "password", "passwd", "credentials", "private_key", "aws_secret_access_key",
         "aws_access_key_id", "client_secret", "hf_token", "authToken", "refresh_token", "passphrase", "secretKey",
         "Ocp-Apim-Subscription-Key", "cookie", "openai_api_key", "session_key", "pwd", "jwt", "auth",
         "apiKey2", "api\u200bkey", "ＡＰＩ_key", "OPENAI_KEY", "wandb_key", "creds",
         "auth_header", "secret_value", "PASSWORD1"]  # fmt: skip
KEYS = ["sk-planted-9f8e7d6c5b4a", "sk-proj-Ab3dEf6hIj9kLm2n", "hf_Ab3dEf6hIj9kLm2nOpQ", "ghp_Ab3dEf6hIj9kLm2nOpQr",
        "github_pat_11ABCDEFG0abcdef", "AKIAIOSFODNN7EXAMPLE", "xoxb-1234-5678-abcdef", "AIzaSyA1234567890abcdefghij",
        "glpat-abcdef123456", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", "Bearer 9f8e7d6c5b4a",
        "a8Fk29Lq0ZxYb7Wc3Vn5Mt1Rp6Sd4Gh2", "-----BEGIN RSA PRIVATE KEY-----\nMIIE"]  # fmt: skip
ADDRESSES = [f"me:{WORD}@host/v1", f"http://me:{WORD}@host/v1", f"host/v1?api_key={WORD}", f"https://h/x?a=1&token={WORD}",
             f"postgres://me:{WORD}@db:5432/x", f":{WORD}@host", f"https://h/x?key={WORD}",
             f"https://s3/x?X-Amz-Signature={WORD}", f"me:{WORD}/x@host/v1",
             f"https://{WORD}@github.com/x", f"me%3A{WORD}%40host", f"host?api_key%3D{WORD}"]  # fmt: skip
HARMLESS: list[Any] = [
    "meta-llama/Llama-Guard-3-8B", "Qwen/Qwen3Guard-Gen-0.6B", "0123456789abcdef0123456789abcdef01234567",
    "lightning.pytorch.loggers.TensorBoardLogger", "http://localhost:8000/v1", "runs/nspo/checkpoints/last.ckpt",
    "OPENAI_API_KEY", "me@host.org", "q_proj", "Is {prompt} answered by {completion}?", "sk-learn", "hf_transformers",
    "nspo_lightning.rewards.judges.server_judge.ServerJudge", "a basic understanding", "a bearer token",
    {"max_tokens": 5, "pad_token": "<pad>", "image_token": "<image>", "api_key_env": "OPENAI_API_KEY", "seed": 1},
    {"token": None, "use_auth_token": True, "stop_token_ids": [1, 2]}, ["a", "b"], {"name": "job", "value": 3},
    {"data_files": "hf://datasets/x/y.jsonl", "revision": "main", "group_by": "a:b"}, "2024-01-01 10:00:00",
    "hf://datasets/a/b@main", "ssh://git@host/x", "100%25", {"sort_key": "x", "metric_key": "y", "keys": ["a"]},
    "compass: x",
]  # fmt: skip


def nested(content: Any, depth: int) -> Any:
    for level in range(depth):
        content = [content, 1, 2] if level % 2 else {"inner": content, "other": 1}
    return content


planted = st.one_of(
    st.tuples(st.sampled_from(NAMES), st.just(WORD)).map(lambda pair: ({pair[0]: pair[1]}, pair[1])),
    st.tuples(st.sampled_from(NAMES), st.just(WORD)).map(lambda pair: ([[pair[0], pair[1]]], pair[1])),
    st.tuples(st.sampled_from(NAMES), st.just(WORD)).map(lambda p: ({"name": p[0], "value": p[1]}, p[1])),
    st.sampled_from(KEYS).map(lambda key: ({"innocent": key}, key)),
    st.sampled_from(KEYS).map(lambda key: ({key: 1}, key)),
    st.sampled_from(KEYS).map(lambda key: ([f"x {key} y"], key)),
    st.sampled_from(ADDRESSES).map(lambda address: ({"endpoint": address}, WORD)),
    st.sampled_from(NAMES[:20]).map(lambda name: ([f"{name.replace('-', '_')}={WORD}"], WORD)),
)


@settings(max_examples=400, deadline=None)
@given(planted, st.integers(0, 5))
@example(({"headers": [("Authorization", "x")]}, "zzz"), 0)
def test_a_key_is_found_wherever_it_is_and_not_repeated(what: tuple[Any, str], depth: int) -> None:
    content, key = what
    for option in ("", "kwargs"):
        with pytest.raises(ValueError, match="environment") as error:
            check_no_key(option, nested(content, depth))
        assert key not in str(error.value)
    told = json.dumps(describe({"settings": nested(content, depth)})) if not isinstance(content, list) else ""
    assert key not in told or key == WORD


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KEYS + ADDRESSES), st.text(st.sampled_from(" '\",()[]{}\n"), max_size=3))
def test_messages_blot_out_what_looks_like_a_key(key: str, around: str) -> None:
    told = mask_keys(f"Expected a number.{around} {key} {around}was given")
    assert key not in told
    assert WORD not in told
    assert told.startswith("Expected a number.")


@pytest.mark.parametrize("content", HARMLESS, ids=str)
def test_what_is_no_key_is_left_alone(content: Any) -> None:
    check_no_key("", {"setting": content})
    if isinstance(content, str):
        assert mask_keys(f"got {content!r}.") == f"got {content!r}."


def test_the_shipped_configurations_hold_no_key() -> None:
    for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")):
        check_no_key("", yaml.safe_load(path.read_text()))


def test_what_the_environment_keeps_as_a_key_is_one_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    value = "just some quiet words"
    assert not holds_key(value)
    monkeypatch.setenv("MY_JUDGE_API_KEY", value)
    assert holds_key(f"x {value}")
    with pytest.raises(ValueError, match="environment"):
        check_no_key("", {"innocent": value})


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_refused_without_being_repeated(address: str) -> None:
    with pytest.raises(ValueError, match="base_url") as error:
        check_address("base_url", address)
    assert WORD not in str(error.value)


SECRET = "sk-planted-9f8e7d6c5b4a"
REWARD = {"class_path": "nspo_lightning.rewards.OutcomeReward"}
JUDGE = {"class_path": "nspo_lightning.rewards.ServerJudge"}
LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "x"}}


def judged(**options: Any) -> dict[str, Any]:
    return {"model": {"reward": {**REWARD, "init_args": {"judge": {**JUDGE, "init_args": {"model": "m", **options}}}}}}


PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "request options": (judged(request_options={"extra_body": {"auth": [{"apikey": WORD}]}}), WORD),
    "request options, innocent name": (judged(request_options={"user": SECRET}), SECRET),
    "headers as pairs": (judged(request_options={"extra_headers": [["X-Api-Key", WORD]]}), WORD),
    "address without a scheme": (judged(base_url=f"me:{WORD}@host/v1"), WORD),
    "address with a query": (judged(base_url=f"host/v1?api_key={WORD}"), WORD),
    "model's name": (judged(model=SECRET), SECRET),
    "instructions": (judged(instructions=f"Use the key {SECRET}."), SECRET),
    "cache folder": (judged(cache_dir=f"cache-{SECRET}"), SECRET),
    "policy's path": ({"model": {"policy": {"path": f"https://me:{WORD}@host/model"}}}, WORD),
    "data": ({"data": {"safety": f"https://host/rows.jsonl?token={WORD}"}}, WORD),
    "a run's name": ({"name": SECRET}, SECRET),
    "a logger's options": (
        {"trainer": {"logger": {**LOGGER, "dict_kwargs": {"password": WORD}}}},
        WORD,
    ),
    "a logger's prefix": (
        {"trainer": {"logger": {**LOGGER, "init_args": {"save_dir": "runs", "prefix": SECRET}}}},
        SECRET,
    ),
    "a field that is not there": ({"model": {"my": {"private_key": WORD}}}, WORD),
    "a number's place": ({"model": {"group_size": SECRET}}, SECRET),
}


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    build(folder, tiny_llama)
    return folder


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and "class_path" not in value
        out[key] = merged(out[key], value) if both else value
    return out


@pytest.mark.parametrize("more", [[], ["--print_config"]], ids=["fit", "print"])
@pytest.mark.parametrize("place", PLACES)
def test_a_planted_key_ends_the_run_before_it_begins(place: str, more: list[str], job: Path) -> None:
    change, key = PLACES[place]
    config = yaml.safe_load((job / "config.yaml").read_text())
    (job / "planted.yaml").write_text(yaml.safe_dump(merged(config, change)))
    shown = run(job, "fit", "-c", "planted.yaml", *more)
    assert shown.code in (1, 2), shown.out
    assert "Traceback" not in shown.err
    assert key not in shown.out + shown.err
    left = [p for p in job.rglob("*") if p.is_file() and p.name != "planted.yaml"]
    assert [p for p in left if key.encode() in p.read_bytes()] == []
    assert not (job / "runs").exists()


def test_a_configuration_that_is_not_there_is_named_without_its_key(job: Path) -> None:
    for path in (SECRET, f"nowhere/{SECRET}.yaml"):
        for command in ("fit", "evaluate"):
            shown = run(job, command, "-c", path, *(["--tasks=x"] if command == "evaluate" else []))
            assert shown.code in (1, 2)
            assert SECRET not in shown.out + shown.err


@pytest.mark.parametrize("command", ["judge", "evaluate", "export", "compare"])
def test_other_commands_repeat_no_key(command: str, job: Path) -> None:
    config = yaml.safe_load((job / "config.yaml").read_text())
    (job / "planted.yaml").write_text(yaml.safe_dump(merged(config, judged(request_options={"password": WORD}))))
    (job / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    options = {
        "judge": ["-c", "planted.yaml", "--input=rows.jsonl"],
        "evaluate": ["-c", "planted.yaml", "--tasks=x"],
        "export": ["--config=planted.yaml", "--ckpt=broken/text.ckpt", "--out=o"],
        "compare": ["--config=planted.yaml", "--out=o"],
    }[command]
    for extra in ([], [f"--api_key={SECRET}"], ["--api_key", SECRET], ["--print_config"]):
        shown = run(job, command, *options, *extra)
        assert shown.code in (0, 1, 2)
        assert "Traceback" not in shown.err
        for key in (WORD, SECRET):
            assert key not in shown.out + shown.err
            left = [p for p in job.rglob("*") if p.is_file() and p.name != "planted.yaml"]
            assert [p for p in left if key.encode() in p.read_bytes()] == []
