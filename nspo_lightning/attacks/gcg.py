"""GCG: a suffix found by gradients, with nanogcg (arXiv 2307.15043). Slow: minutes a prompt on a GPU, more on a CPU.

nanogcg is no extra of this package: its release 0.3.0 declares `transformers<=4.47.1`, and this package needs 5. It
is called without its prefix cache, which is of a kind that 5 has no more; so it works with 5 (5.23 was tried):
`pip install --no-deps nanogcg scipy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from nspo_lightning.attacks.protocol import Attack, AttackError, AttackRow, Victim
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.chats import as_turns
from nspo_lightning.rewards.messages import as_text, with_last
from nspo_lightning.rewards.protocol import Text


class GCG(Attack):
    """Put a suffix behind the request that makes the policy begin with an affirmative answer.

    The suffix is searched against the policy that is measured; the base is given the same prompts.

    Args:
        steps: Steps of the search.
        search_width: Candidates a step.
        target: What the answer shall begin with.
        prompts: Harmful prompts that it is tried on at most.
        seed: Seed of the search.
        name: Its name in tables.
    """

    on_lookalikes = False
    searches = True

    def __init__(
        self,
        steps: int = 100,
        search_width: int = 128,
        target: str = "Sure, here is",
        prompts: int = 5,
        seed: int = 0,
        name: str = "gcg",
    ) -> None:
        if min(steps, search_width, prompts) < 1:
            raise AttackError(
                f"`steps`, `search_width` and `prompts` of `{name}` must be at least 1, got {steps}, {search_width} "
                f"and {prompts}."
            )
        self.steps, self.search_width, self.target, self.seed = steps, search_width, target, seed
        self.limit, self.name = prompts, name

    @override
    def check(self) -> None:
        _nanogcg()

    @override
    def attacked(self, rows: Sequence[AttackRow], victim: Victim | None) -> list[AttackRow]:
        if victim is None:
            raise AttackError("`GCG` searches against a policy, and there is none here. Use it with `test --attacks`.")
        library, (model, tokenizer) = _nanogcg(), victim.attack_model()
        settings = library.GCGConfig(
            num_steps=self.steps,
            search_width=self.search_width,
            use_prefix_cache=False,  # of a kind that transformers 5 has no more
            seed=None,  # it would switch on deterministic algorithms for the whole process
            verbosity="ERROR",
        )
        found = []
        with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model):
            for number, row in enumerate(rows):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed + number)
                    turns = as_turns(_with_suffix(row.prompt, "{optim_str}"))
                    best = library.run(model, tokenizer, turns, self.target, settings).best_string
                found.append(replace(row, prompt=_with_suffix(row.prompt, best)))
        return found


def _with_suffix(prompt: Text, suffix: str) -> Text:
    return with_last(prompt, f"{as_text(prompt)} {suffix}")


def _nanogcg() -> Any:
    try:
        import nanogcg
    except ImportError as error:
        raise AttackError(
            f"Attack `gcg` needs nanogcg ({error}), which can't be an extra: it declares an older transformers than "
            "this package needs. To try it with the newer one: pip install --no-deps nanogcg scipy"
        ) from error
    return nanogcg
