"""Training completions from a server: after each update the adapter travels, the base never does.

The server keeps the base in its own precision and applies the adapter beside it, so nothing is merged: neither 4-bit
rounding nor the drift of repeated merging can enter. What remains is the difference of two implementations' arithmetic,
which the server's log-probabilities tell and a truncated importance ratio corrects (`nspo_lightning.grpo.objective`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from typing import Any

from torch import Tensor, nn

from nspo_lightning.grpo.batch import Rollout
from nspo_lightning.rollout.config import SamplingConfig
from nspo_lightning.rollout.places import Places
from nspo_lightning.rollout.server_adapters import AdapterShelf
from nspo_lightning.rollout.server_client import AdapterGoneError, RolloutServerError, ServerClient
from nspo_lightning.rollout.server_config import ServerSettings
from nspo_lightning.rollout.server_reply import ServedCompletion, as_rollout, completion_request, read_completions
from nspo_lightning.terminal import counted

_SEEDS_A_CALL = 2**20  # prompts and completions of one call count up from its seed


class RolloutServer:
    """Draws groups of completions on a server."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.client = ServerClient(settings)
        self.shelf = AdapterShelf(self.client)

    def check(self, sampling: SamplingConfig) -> None:
        """See that the server is there, serves the base, and will load adapters, or say how to mend it."""
        models = self.client.models(patient=False)
        bases = [str(model["id"]) for model in models if not model.get("parent")]
        if self.settings.model not in bases:
            raise RolloutServerError(
                f"The rollout server offers {', '.join(bases) or 'nothing'}, not '{self.settings.model}'. Serve the "
                "policy's base, or mend `rollout_server.model`."
            )
        # Without names the request can't load anything, but it shows whether there is someone to ask.
        status, said = self.client.status_of("/load_lora_adapter", {"lora_name": "", "lora_path": ""})
        if status in (401, 403):
            raise RolloutServerError(
                f"The rollout server refuses the key (status {status}). Set the right one in "
                f"{self.settings.api_key_env}."
            )
        if status in (404, 405):
            raise RolloutServerError(
                "The rollout server loads no adapters at run time. Start vLLM with `--enable-lora` and the environment "
                "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
            )
        if status >= 500:
            raise RolloutServerError(f"The rollout server fails to load adapters (status {status}): {said[:200]}")
        self._check_log_probs(sampling)

    def _check_log_probs(self, sampling: SamplingConfig) -> None:
        drawing = replace(sampling, min_p=sampling.min_p or None, stop_token_ids=(), stop_strings=())
        if drawing == SamplingConfig(max_new_tokens=sampling.max_new_tokens):
            return  # then both kinds are the same
        plain = SamplingConfig(max_new_tokens=1)
        tops = []
        for temperature in (1.0, 4.0):
            request = completion_request(self.settings.model, [0, 1], 1, plain, [], 0)
            reply = self.client.post("/completions", {**request, "temperature": temperature, "logprobs": 1})
            choices = reply.get("choices") if isinstance(reply, dict) else None
            scored = (choices[0].get("logprobs") or {}) if choices else {}
            tops.append(max((scored.get("top_logprobs") or [{}])[0].values(), default=float("nan")))
        if tops[0] == tops[1] and tops[0] < 0:
            raise RolloutServerError(
                "The rollout server's log-probabilities are those before temperature, top-p, top-k and penalties, so "
                "they are not those that tokens are drawn with. Start vLLM with `--logprobs-mode processed_logprobs`, "
                "or sample at temperature 1 with nothing else set."
            )

    def publish(self, policy: nn.Module, update: int) -> str:
        """Bring a PEFT model's adapter as it is now to the server (one process does this); return its name there."""
        return self.shelf.publish(policy, update)

    def sample(
        self,
        name: str,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        group_size: int,
        config: SamplingConfig,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        vocab_size: int,
        seed: int,
        prompt_places: Places | None = None,
    ) -> Rollout:
        """Return groups drawn from a published adapter, with the log-probabilities of their tokens.

        Args:
            name: The adapter's.
            prompt_ids: Shape (P, L), left-padded.
            prompt_mask: Shape (P, L), bool, True = real token.
            group_size: G.
            config: Sampling settings.
            eos_token_ids: Every one of them ends a completion.
            pad_token_id: Fills shorter completions.
            vocab_size: Size of the policy's vocabulary.
            seed: The same call with the same seed asks for the same.
            prompt_places: Where these prompts stand in a larger batch that shares the seed; None = they are all of it.
        """
        prompts = [row[mask.bool()].tolist() for row, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        first = (seed * _SEEDS_A_CALL) % 2**62

        def ask(index: int) -> list[ServedCompletion]:
            place = index * group_size
            if prompt_places is not None:
                whole = prompt_places.group_size or group_size
                place = prompt_places.mine[index] * whole + prompt_places.first
            request = completion_request(name, prompts[index], group_size, config, eos_token_ids, first + place)
            return read_completions(self._ask(request), request, eos_token_ids, vocab_size)

        # Its threads are daemons: neither a signal nor the end of the process waits for an answer.
        with ThreadPool(min(self.settings.concurrency, len(prompts))) as pool:
            groups = list(pool.imap(ask, range(len(prompts))))
        return as_rollout(prompt_ids, prompt_mask, groups, eos_token_ids, pad_token_id)

    def _ask(self, request: dict[str, Any]) -> Any:
        for _ in range(self.settings.retries + 1):
            try:
                return self.client.post("/completions", request)
            except AdapterGoneError:  # the server has restarted: it shall have the adapter again
                self.shelf.load(request["model"])
        raise RolloutServerError(
            f"The rollout server loaded the adapter '{request['model']}' "
            f"{counted(self.settings.retries + 1, 'time')} and did not know it afterwards. Several API processes "
            "share nothing: run one (`--api-server-count 1`)."
        )
