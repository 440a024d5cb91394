"""One definition of what a secret is called, for refusing, leaving out and masking alike."""

from __future__ import annotations

import time

import pytest

from nspo_lightning.keys import check_no_key, looks_secret, mask_keys

CREDENTIALS = ["api_key", "apiKey", "X-API-Key", "openai_api_key", "Authorization", "password", "client_secret",
               "token", "hf_token", "accessToken", "access-token", "accesstoken"]  # fmt: skip
HARMLESS = ["max_tokens", "stop_token_ids", "pad_token", "temperature", "tokenizer", "seed"]


@pytest.mark.parametrize("name", CREDENTIALS)
def test_a_credential_is_refused_left_out_and_masked(name: str) -> None:
    with pytest.raises(ValueError, match=f"`request_options` holds a field called '{name}'"):
        check_no_key("request_options", [{"deep": {name: "x"}}])
    assert looks_secret(name)
    if name != "accessToken":  # in free text, two words without a mark between them are not told apart
        assert mask_keys(f"{{'{name}': 'sk-123'}}") == f"{{'{name}': '***'}}"


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_sounds_like_one_is_kept(name: str) -> None:
    check_no_key("request_options", {name: 1})
    assert mask_keys(f"{name}=5") == f"{name}=5"


@pytest.mark.parametrize("name", ["key", "my_key", "api_key_env", "extra_headers", "token_file", "secret_path"])
def test_reports_leave_more_out_than_credentials(name: str) -> None:
    assert looks_secret(name)
    check_no_key("request_options", {name: 1})  # which is no reason to refuse it
    assert not looks_secret("max_tokens")


PIECES = ["a", "a_", "a:", "sk-", "A1a", "//", "api_key", "'", "-", "--a", "/:", "x-eyJaaaaaaaaa", "1", "%41", "token "]


@pytest.mark.parametrize("piece", PIECES)
def test_a_long_text_takes_no_time(piece: str) -> None:
    start = time.process_time()
    mask_keys(piece * (20_000 // len(piece)))
    looks_secret(piece * (2_000 // len(piece)) + "x")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "GOOGLE_APPLICATION_CREDENTIALS"])
def test_a_path_in_the_environment_is_no_key(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, str(tmp_path))  # the shell's own folder, or a file that holds a key and is none
    model = str(tmp_path / "model")
    check_no_key("", {"model": {"policy": {"path": model}}})
    assert mask_keys(f"could not load {model}") == f"could not load {model}"
    monkeypatch.setenv("DB_PASSWORD", "/not-a-path-at-all")
    with pytest.raises(ValueError, match="looks like a key"):
        check_no_key("", {"note": "x/not-a-path-at-all"})
