"""Requests to the rollout server: bounded in time and in tries, and every failure as one line that names the cure."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from nspo_lightning.rewards.judges.judge_retry import RETRYABLE_STATUS, RetryPolicy, retry_after_s
from nspo_lightning.rollout.server_config import ServerSettings
from nspo_lightning.terminal import counted

LONGEST_WAIT_S = 30.0


class RolloutServerError(ValueError):
    """The server can't be reached, refuses, or answers something that must not be trained on."""


class AdapterGoneError(RolloutServerError):
    """The server does not know the adapter (any more): it has restarted, or evicted it."""


class ServerClient:
    """The few calls that rollouts need, over the `openai` client. Threads may share it."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._retry = RetryPolicy(
            max_retries=settings.retries, backoff_s=settings.backoff_s, backoff_max_s=LONGEST_WAIT_S
        )
        self._rng = random.Random(0)
        self._client: Any = None
        self._stopped = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def stop(self) -> None:
        """Send nothing any more: a request that waits to be tried again, on whatever thread, raises instead."""
        self._stopped = True

    def start(self) -> None:
        """Send requests (again)."""
        self._stopped = False

    def models(self, *, patient: bool = True) -> list[dict[str, Any]]:
        """Return one `{"id", "root", "parent", ...}` for the base and each adapter that the server offers.

        Patient, it tries again while the server is away; at the start of a run nobody wants to wait for a typing error.

        Raises:
            RolloutServerError: If the answer is no such list.
        """
        reply = self._call("GET", "/models", patient=patient)
        listed = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(listed, list) or not all(isinstance(model, dict) and "id" in model for model in listed):
            raise RolloutServerError(
                f"{self.settings.base_url}/models answered no list of models. `rollout_server.base_url` must be the "
                "`/v1` address of an OpenAI-compatible server."
            )
        return listed

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Post JSON to a path behind the `/v1`, again where that can help; return the parsed reply, or its text."""
        return self._call("POST", path, body, patient=True)

    def status_of(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Post once and return the HTTP status and the reply's text, whatever they are."""
        import openai

        try:
            return 200, str(self._once("POST", path, body))
        except openai.APIStatusError as error:
            return error.status_code, self.without_key(error.response.text[:500])
        except openai.APIError as error:
            raise self._unreachable(error, 1) from None

    def without_key(self, text: str) -> str:
        """Return the text with `***` where it contains the key."""
        key = os.environ.get(self.settings.api_key_env, "")
        return text.replace(key, "***") if key else text

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, patient: bool) -> Any:
        import openai

        tries = 0
        while True:
            if self._stopped:
                raise RolloutServerError("The run has ended, and nothing is asked of the rollout server any more.")
            tries += 1
            try:
                return self._once(method, path, body)
            except openai.APIStatusError as error:
                status, asked_s = error.status_code, retry_after_s(error.response.headers)
                if status not in RETRYABLE_STATUS and status < 500:
                    raise self._refused(status, error.response.text, path, body) from None
                failure: RolloutServerError = self._refused(status, error.response.text, path, body)
            except openai.APIError as error:  # no connection, no answer in time, no readable answer
                failure, asked_s = self._unreachable(error, tries), None
            wait_s = self._retry.wait_s(tries, asked_s, self._rng) if patient else None
            if wait_s is None:
                raise failure from None
            time.sleep(wait_s)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        if self._client is None:
            self._client = _client(self.settings)
        if method == "GET":
            text = self._client.get(path, cast_to=str)
        else:
            text = self._client.post(path, cast_to=str, body=body)
        try:
            return json.loads(text)
        except (TypeError, ValueError):
            return text

    def _unreachable(self, error: Exception, tries: int) -> RolloutServerError:
        import openai

        where = self.settings.base_url
        if isinstance(error, openai.APITimeoutError):
            return RolloutServerError(
                f"The rollout server at {where} gave no answer within `rollout_server.timeout_s` = "
                f"{self.settings.timeout_s:g} s ({counted(tries, 'try', 'tries')}). Raise it, or look whether the "
                "server is overloaded."
            )
        cause = self.without_key(str(error.__cause__ or error))[:200]
        return RolloutServerError(
            f"No rollout server answers at {where} ({cause}; {counted(tries, 'try', 'tries')}). Start it, or mend "
            "`rollout_server.base_url`."
        )

    def _refused(self, status: int, text: str, path: str, body: dict[str, Any] | None) -> RolloutServerError:
        said = " ".join(self.without_key(text).split())[:300]
        if status in (401, 403):  # what a server says of a key may show the key
            return RolloutServerError(
                f"The rollout server refuses the key (status {status}). Set the right one in the environment variable "
                f"{self.settings.api_key_env} (`rollout_server.api_key_env`)."
            )
        if status == 404 and path == "/completions":
            return AdapterGoneError(f"The rollout server does not know the model '{(body or {}).get('model')}': {said}")
        return RolloutServerError(f"The rollout server answered {path} with status {status}: {said}")


def _client(settings: ServerSettings) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise RolloutServerError(
            "Rollouts on a server need the openai client: pip install 'nspo-lightning[judges]'."
        ) from error
    key = os.environ.get(settings.api_key_env) or "none"
    return OpenAI(base_url=settings.base_url, api_key=key, timeout=settings.timeout_s, max_retries=0)
