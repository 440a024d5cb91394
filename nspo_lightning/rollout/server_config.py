"""Where training completions come from when a server draws them."""

from __future__ import annotations

from dataclasses import dataclass

from nspo_lightning.keys import check_address, check_key_name

IMPORTANCE_CAP = 2.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """An OpenAI-compatible completions server that loads LoRA adapters at run time, such as vLLM.

    Attributes:
        base_url: The server's address, with its `/v1`.
        model: The name under which the server offers the base.
        adapter_folder: Folder on a file system that trainer and server share; this run writes its adapters there, one
            after the other. One run, one folder: what an earlier run left loaded from it is unloaded.
        server_adapter_folder: The same folder as the server sees it, if its path is another one there.
        api_key_env: Environment variable that holds the key, if the server wants one.
        timeout_s: Limit of one request; a request is one prompt with its group of completions.
        retries: Tries after the first. The waits between them double, up to 30 s: 12 bridge a restart of 4 minutes.
        backoff_s: The first wait.
        concurrency: Requests under way at once, on each rank.
        overlap: Draw the next rollout while this one is trained on, by the policy of before that update. The importance
            ratio corrects it; `rollout/staleness` is logged. False = each rollout is drawn by the present policy.
        importance_cap: A token's weight in the loss is its probability under the trainer over the one under the
            server, at most this.
        warn_logp_difference: Mean absolute difference of the log-probabilities, in nats a token, that is warned of.
        max_logp_difference: The one that ends the run: another base or another adapter must have answered.
    """

    base_url: str
    model: str
    adapter_folder: str
    server_adapter_folder: str | None = None
    api_key_env: str = "ROLLOUT_API_KEY"
    timeout_s: float = 600.0
    retries: int = 12
    backoff_s: float = 1.0
    concurrency: int = 64
    overlap: bool = False
    importance_cap: float = IMPORTANCE_CAP
    warn_logp_difference: float = 0.1
    max_logp_difference: float = 1.0

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        check_address("rollout_server.base_url", self.base_url)
        check_key_name("rollout_server.api_key_env", self.api_key_env)
        values = vars(self)
        for name in ("model", "adapter_folder"):
            if not values[name]:
                raise ValueError(f"`rollout_server.{name}` must not be empty.")
        for name in ("timeout_s", "concurrency", "warn_logp_difference", "max_logp_difference"):
            if values[name] <= 0:
                raise ValueError(f"`rollout_server.{name}` must be positive, got {values[name]}.")
        if self.retries < 0 or self.backoff_s < 0:
            raise ValueError(
                "`rollout_server.retries` and `backoff_s` must not be negative, got "
                f"{self.retries} and {self.backoff_s}."
            )
        if self.importance_cap < 1:
            raise ValueError(
                f"`rollout_server.importance_cap` must be at least 1, got {self.importance_cap}: below that, tokens "
                "that server and trainer agree on would lose weight. 2 is a good start."
            )
