"""The policy as a module holds it: the model with its adapter, its tokenizer, and what it answers to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from nspo_lightning.atomic import give_ordinary_permissions, write_json
from nspo_lightning.grpo import Rollout
from nspo_lightning.policy.base_record import RECORD, base_record
from nspo_lightning.policy.chat_template import set_chat_template_, with_chat_template
from nspo_lightning.policy.chats import as_turns
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.parts import causal_model, text_setting
from nspo_lightning.policy.sampling_weights import Mode, SamplingWeights, choose_sampling_weights
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.tokenizer import end_of_turn_id, load_tokenizer, stop_token_ids
from nspo_lightning.policy.unpacked import hold_unpacked, is_held
from nspo_lightning.policy.vocabulary import Vocabulary, check_vocabulary
from nspo_lightning.policy.warm_start import WarmStart, load_warm_start_
from nspo_lightning.rollout import SamplingConfig, sample
from nspo_lightning.rollout.places import Places
from nspo_lightning.rollout.stopping import stop_at
from nspo_lightning.rollout.texts import completion_texts

PREFIX_IDS = "prefix_ids"
"""In a batch: the tokens at the end of each prompt that begin its answer, a list a row; see `module.prefixes`."""


class TextPolicy:
    """A causal language model with its tokenizer, each loaded when it is needed.

    Args:
        settings: The model and its adapter.
        share_prefix: Run each prompt once a group.

    Attributes:
        model: The PEFT model, or the plain model without an adapter; None before `load`.
        fingerprint: Names the base; "" before `load`.
    """

    def __init__(self, settings: PolicySettings, *, share_prefix: bool = True) -> None:
        self.settings = settings
        self.share_prefix = share_prefix
        self.model: nn.Module | None = None
        self.fingerprint = ""
        self._vocabulary: Vocabulary | None = None
        self._weights: SamplingWeights | None = None
        self._trained: frozenset[str] = frozenset()
        self._tokenizer: Any = None
        self._end_ids: list[int] | None = None

    def load(self, device: torch.device) -> nn.Module:
        """Load base and adapter and return the model, ready to train; all ranks load together."""
        self.model = load_policy(self.settings, device)
        self._vocabulary = check_vocabulary(self.model, self.tokenizer, self.settings)
        note = hold_unpacked(self.model, self.settings)
        self._weights, other_note = choose_sampling_weights(self.model, self.settings)
        for line in filter(None, (note, other_note)):
            rank_zero_info(line)
        self.fingerprint = policy_fingerprint(self.model)
        self._trained = self._trainable_names()
        return self.model

    def start_warm(self) -> WarmStart | None:
        """Put the weights of `policy.adapter` in place, if the settings have one that is not merged.

        Returns:
            What its folder says of it; None without one.

        Raises:
            PolicyError: If it does not belong on this policy.
        """
        if self.settings.warm_start is None:
            return None
        return load_warm_start_(self.require(), self.settings, self.fingerprint)

    def require(self) -> Any:
        """Return the loaded model."""
        if self.model is None:
            raise RuntimeError("The policy is not loaded yet: `configure_model` loads it, and a Trainer calls that.")
        return self.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for (datamodules need it before the policy is there)."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.settings)
        return self._tokenizer

    def use_chat_template(self, template: str) -> None:
        """Take a datamodule's chat template for all uses; PolicyError if the settings have another."""
        self.settings = with_chat_template(self.settings, template)
        if self._tokenizer is not None:
            set_chat_template_(self._tokenizer, self.settings)
        self._end_ids = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.require().parameters()).device
        return device

    @property
    def sampling_mode(self) -> Mode:
        """Which weights training draws completions with."""
        mode = "quantized" if self._weights is None else self._weights.mode
        held = mode == "quantized" and any(map(is_held, self.require().modules()))
        return "dequantized" if held else mode

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the policy's context holds, as far as its configuration says."""
        if self.model is None:
            return None
        limit = text_setting(causal_model(self.model), "max_position_embeddings")
        return int(limit) if limit is not None else None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that require a gradient: what the optimizer trains."""
        return [parameter for parameter in self.require().parameters() if parameter.requires_grad]

    def trained_names(self) -> frozenset[str]:
        """Name what is trained, and what was until a callback froze it (`freeze_down`): a resume needs both."""
        return self._trained | self._trainable_names()

    def _trainable_names(self) -> frozenset[str]:
        return frozenset(name for name, parameter in self.require().named_parameters() if parameter.requires_grad)

    def save(self, folder: str | Path) -> None:
        """Write what was trained as a PEFT adapter (or, without one, the whole model) that `from_pretrained` loads."""
        plain = self.settings.lora is None
        # PEFT would write the frozen weight of an adapted head too.
        self.require().save_pretrained(str(folder), **({} if plain else {"save_embedding_layers": False}))
        self.tokenizer.save_pretrained(str(folder))
        if not plain:
            (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's template, with nothing filled in
            write_json(self.base_record(), Path(folder) / RECORD)
        give_ordinary_permissions(Path(folder), "*.safetensors")

    def base_record(self) -> dict[str, Any]:
        """Return which base this is, as noted in checkpoints and beside adapters."""
        return base_record(self.settings, self.fingerprint)

    def generate(
        self,
        batch: Mapping[str, Any],
        sampling: SamplingConfig,
        group_size: int,
        seed: int,
        prompt_places: Places | None = None,
        *,
        exact: bool = False,
        with_log_probs: bool = False,
    ) -> tuple[Rollout, list[str]]:
        """Answer a batch of prompts.

        Args:
            batch: `prompt_ids` (P, L) left-padded and `prompt_mask` (P, L), True = real token; maybe `PREFIX_IDS`.
            sampling: Sampling settings.
            group_size: Completions a prompt, G.
            seed: Seed of the sampling noise.
            prompt_places: Where the prompts stand in the batch of all ranks, see `rollout.places`; None = alone.
            exact: Draw from the trained function, not from merged weights, which are rounded: what measures a policy
                does not correct for it.
            with_log_probs: Keep the log-probabilities of the drawn tokens in any case.

        Returns:
            The rollout, with log-probabilities where other weights than the trained ones drew it, and the P * G
            completions as text.
        """
        model = self.require()
        weights = self._weights or SamplingWeights(model, "quantized")
        weights = weights.exact() if exact else weights
        self.check_room(batch["prompt_ids"].shape[1], sampling.max_new_tokens)
        with weights.in_place():
            rollout = sample(
                model,
                batch["prompt_ids"],
                batch["prompt_mask"],
                group_size=group_size,
                config=sampling,
                eos_token_ids=self.end_ids(sampling),
                pad_token_id=self.tokenizer.pad_token_id,
                stop=stop_at(self.tokenizer, sampling.stop_strings),
                generator=torch.Generator(device=self.device).manual_seed(seed % 2**63),
                share_prefix=self.share_prefix,
                prompt_places=prompt_places,
                with_log_probs=weights.differ or with_log_probs,
            )
        return rollout, completion_texts(self.tokenizer, rollout, sampling, batch.get(PREFIX_IDS))

    def end_ids(self, sampling: SamplingConfig) -> list[int]:
        """Return every token that ends a completion: EOS, the end of the template's turns, those of the settings."""
        if self._end_ids is None:
            self._end_ids = stop_token_ids(self.require(), self.tokenizer)
            turn = end_of_turn_id(self.tokenizer)
            if turn is not None and turn not in self._end_ids:
                self._end_ids.append(turn)
                rank_zero_info(
                    f"The chat template ends turns with {self.tokenizer.convert_ids_to_tokens(turn)!r} (token {turn}), "
                    "which is no EOS of the policy: it ends completions too."
                )
        if odd := [token for token in sampling.stop_token_ids if token >= len(self.tokenizer)]:
            raise PolicyError(
                f"`sampling.stop_token_ids` has {odd[0]}, and the tokenizer has {len(self.tokenizer)} tokens, so it "
                "would never be drawn. Give ids of this tokenizer."
            )
        return sorted({*self._end_ids, *sampling.stop_token_ids})

    def render(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Render texts or chats with the chat template, as a batch that `generate` takes."""
        chats = map(as_turns, prompts)
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        self.check_tokens(encoded["input_ids"].tolist())
        encoded = encoded.to(self.device)
        return {"prompt_ids": encoded["input_ids"], "prompt_mask": encoded["attention_mask"].bool()}

    def check_tokens(self, texts: Sequence[Sequence[int]]) -> None:
        """Refuse texts, as token ids, with a token that the loaded policy has no row for; PolicyError names it."""
        if self._vocabulary is not None:
            self._vocabulary.check(texts)

    def check_room(
        self, prompt_tokens: int, max_new_tokens: int, setting: str = "max_new_tokens", begun: int = 0
    ) -> None:
        """Refuse prompts that leave no room in the policy's context for completions, whose length `setting` limits.

        `begun` is how many tokens answers may begin with, behind the prompt.

        Raises:
            PolicyError: If there is no room.
        """
        limit = self.context_tokens
        if limit is None or prompt_tokens + begun + max_new_tokens <= limit:
            return
        room = limit - max_new_tokens - begun
        shorten = f"leave longer prompts out (`data.max_prompt_tokens: {room}`), or " if room > 0 else ""
        beginning = f"up to {begun} more begin its answer (`prefixes.max_tokens`), " if begun else ""
        lower = f"`prefixes.max_tokens` or `{setting}`" if begun else f"`{setting}`"
        raise PolicyError(
            f"No room left for completions: the longest prompt has {prompt_tokens} tokens, {beginning}`{setting}` is "
            f"{max_new_tokens}, and the policy's context holds {limit}. To mend it, {shorten}lower {lower}."
        )
