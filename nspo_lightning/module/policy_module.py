"""A LightningModule around a policy: loading, generating, measuring, and checkpoints that hold the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from nspo_lightning.evaluation.rates import Answers, RateTable, general_outcomes, safety_outcomes
from nspo_lightning.grpo import Rollout
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.adapter import has_adapter, load_adapter_, save_adapter
from nspo_lightning.policy.divergence import TextSums
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import load_policy
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.text_scores import score_text
from nspo_lightning.policy.tokenizer import load_tokenizer, stop_token_ids
from nspo_lightning.rewards import Judge, Outcome, RewardError, RewardSet
from nspo_lightning.rewards.agreement import raise_on_all_ranks
from nspo_lightning.rollout import SamplingConfig, sample
from nspo_lightning.rollout.places import Places, places_among_ranks

EVALUATION_SEED = 20_251_211
STATE_KEY = "nspo_lightning"


class PolicyModule(pl.LightningModule):
    """What a policy needs whatever it learns by.

    Args:
        reward: Scores completions in `predict`.
        judge: Names what a completion is.
        policy: The model and its adapter.
        sampling: How harmful prompts are answered.
        general_max_new_tokens: Length limit of the greedy answers to general prompts.
        over_refusal_skills: General skills whose refusals count as over-refusal; empty = all.
        share_prefix: Run each prompt once a group.
    """

    evaluation_seed = EVALUATION_SEED

    def __init__(
        self,
        *,
        reward: RewardSet,
        judge: Judge,
        policy: PolicySettings,
        sampling: SamplingConfig,
        general_max_new_tokens: int,
        over_refusal_skills: Sequence[str],
        share_prefix: bool,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.judge = judge
        self.policy_settings = policy
        self.evaluation_sampling = sampling
        self.general_sampling = SamplingConfig(max_new_tokens=general_max_new_tokens, temperature=0.0)
        self.over_refusal_skills = tuple(over_refusal_skills)
        self.share_prefix = share_prefix
        self.strict_loading = False  # checkpoints hold trained parameters only
        self.policy: nn.Module | None = None
        self.adapter_folder: Path | None = None  # a trained adapter to measure
        self.fingerprint = ""
        self._trained: frozenset[str] = frozenset()
        self._tokenizer: Any = None
        self._rates = RateTable()

    # ------------------------------------------------------------------ the policy

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for (datamodules need it before the policy is there)."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.policy_settings)
        return self._tokenizer

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the policy's context holds, as far as its configuration says."""
        limit = getattr(getattr(self.policy, "config", None), "max_position_embeddings", None)
        return int(limit) if limit is not None else None

    @override
    def configure_model(self) -> None:
        if self.policy is not None:
            return
        self.reward.prepare()  # a guard's wrong path or a missing key is found before anything long
        if callable(prepare := getattr(self.judge, "prepare", None)):
            prepare()
        device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
        self.policy = load_policy(self.policy_settings, device)
        self.fingerprint = policy_fingerprint(self.policy)
        self._trained = self._trainable_names()
        if self.adapter_folder is not None:
            load_adapter_(self.policy, self.adapter_folder)

    def require_policy(self) -> Any:
        """Return the policy.

        Returns:
            The PEFT model, or the plain model without an adapter.

        Raises:
            RuntimeError: If it is not loaded yet.
        """
        if self.policy is None:
            raise RuntimeError("The policy is not loaded yet: `configure_model` loads it, and a Trainer calls that.")
        return self.policy

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the policy over text; what calibration needs, so logits are made for the last token only.

        Args:
            input_ids: Shape (batch, length).
            attention_mask: Shape (batch, length), 1 = real token.

        Returns:
            Logits of the last position, shape (batch, 1, vocabulary).
        """
        policy = self.require_policy()
        output = policy(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        return cast(Tensor, output.logits)

    def _trainable_names(self) -> frozenset[str]:
        return frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer trains.

        Returns:
            The parameters that require a gradient.
        """
        return [parameter for parameter in self.require_policy().parameters() if parameter.requires_grad]

    def save_adapter(self, folder: str | Path) -> None:
        """Write what was trained as a PEFT adapter (or, without one, the whole model) that `from_pretrained` loads.

        Args:
            folder: Where to.
        """
        save_adapter(self.require_policy(), self.tokenizer, folder)

    # ------------------------------------------------------------------ completions

    def generate(
        self,
        batch: Mapping[str, Any],
        sampling: SamplingConfig,
        group_size: int,
        seed: int,
        prompt_places: Places | None = None,
    ) -> tuple[Rollout, list[str]]:
        """Answer a batch of prompts.

        Args:
            batch: `prompt_ids` (P, L) left-padded and `prompt_mask` (P, L), True = real token.
            sampling: How.
            group_size: Completions a prompt, G.
            seed: Seed of the sampling noise.
            prompt_places: Where the prompts stand in the batch of all ranks, see `rollout.places`; None = alone.

        Returns:
            The rollout, and the P * G completions as text.
        """
        policy = self.require_policy()
        self.check_room(batch["prompt_ids"].shape[1], sampling.max_new_tokens)
        rollout = sample(
            policy,
            batch["prompt_ids"],
            batch["prompt_mask"],
            group_size=group_size,
            config=sampling,
            eos_token_ids=stop_token_ids(policy, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            generator=torch.Generator(device=self.device).manual_seed(seed % 2**63),
            share_prefix=self.share_prefix,
            prompt_places=prompt_places,
        )
        return rollout, self.tokenizer.batch_decode(completion_token_ids(rollout), skip_special_tokens=True)

    def calibration_answers(self, prompts: Sequence[Any]) -> list[str]:
        """Answer prompts greedily, as `calibration_text: prompt_and_model_answer` wants it.

        Args:
            prompts: Texts or chats.

        Returns:
            One answer a prompt.
        """
        chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False).to(self.device)
        batch = {"prompt_ids": encoded["input_ids"], "prompt_mask": encoded["attention_mask"].bool()}
        return self.generate(batch, self.general_sampling, 1, EVALUATION_SEED)[1]

    def check_room(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse prompts that leave no room for completions in the policy's context.

        Args:
            prompt_tokens: The longest prompt.
            max_new_tokens: The length limit of completions.

        Raises:
            PolicyError: If the two don't fit together.
        """
        limit = self.context_tokens
        if limit is None or prompt_tokens + max_new_tokens <= limit:
            return
        room = limit - max_new_tokens
        shorten = f"leave longer prompts out (`data.max_prompt_tokens: {room}`), or " if room > 0 else ""
        raise PolicyError(
            f"No room left for completions: the longest prompt has {prompt_tokens} tokens, `max_new_tokens` is "
            f"{max_new_tokens}, and the policy's context holds {limit}. To mend it, {shorten}lower `max_new_tokens`."
        )

    def classify(self, prompts: list[str], texts: list[str], columns: Mapping[str, Any]) -> list[Outcome | None]:
        """Ask the judge; if it fails on one rank, all raise together (cross-rank synchronisation).

        Args:
            prompts: One for each completion.
            texts: The completions.
            columns: Other columns of the data, a value for each completion.

        Returns:
            What each completion is; None = could not be judged.

        Raises:
            RewardError: What the judge of the lowest failing rank says.
        """
        outcomes: list[Outcome | None] = []
        failed: RewardError | None = None
        try:
            outcomes = self.judge.classify(prompts, texts, **columns)
        except RewardError as error:
            failed = error
        raise_on_all_ranks(failed)
        return outcomes

    # ------------------------------------------------------------------ evaluation

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._rates.update(self._observe(batch, dataloader_idx, batch_idx), self.device)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        answers = self.answer(batch, dataloader_idx, batch_idx)
        self._rates.update(answers.observations, self.device)
        return {"answers": answers}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_rates()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_rates()

    def _log_rates(self) -> None:
        for name, rate in self._rates.compute(self.device).items():  # reduced over ranks already
            # All ranks have the same; `sync_dist` only tells Lightning so.
            self.log(name, rate, prog_bar=name == "general/accuracy", sync_dist=self.trainer.world_size > 1)

    def _observe(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> list[tuple[str, float]]:
        return self.answer(batch, dataloader_idx, batch_idx).observations

    def answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers:
        """Answer a batch of evaluation prompts; all ranks must do it together.

        The noise depends on the place of the prompt alone, whatever the number of ranks that share a batch.

        Args:
            batch: See `generate`.
            dataloader_idx: 0 = harmful prompts, else general ones.
            batch_idx: The batch's number.

        Returns:
            Completions, what the judge calls them, and what is counted.
        """
        columns = batch.get("columns", {})
        seed = EVALUATION_SEED + batch_idx
        harmful = dataloader_idx == 0
        sampling = self.evaluation_sampling if harmful else self.general_sampling
        prompt_places = places_among_ranks(len(batch["prompt_ids"])) if sampling.temperature > 0 else None
        _, texts = self.generate(batch, sampling, 1, seed, prompt_places)
        outcomes = self.classify(batch["prompt"], texts, columns)
        if harmful:
            return Answers(completions=texts, outcomes=outcomes, observations=safety_outcomes(outcomes))
        refused = [outcome == "refusal" for outcome in outcomes]
        observations = general_outcomes(texts, refused, columns, self.over_refusal_skills)
        return Answers(completions=texts, outcomes=outcomes, observations=observations)

    def base_answer(self, batch: Mapping[str, Any], dataloader_idx: int, batch_idx: int) -> Answers | None:
        """Answer as the base does, the policy with its adapter off, with the same noise.

        Args:
            batch: See `answer`.
            dataloader_idx: See `answer`.
            batch_idx: See `answer`.

        Returns:
            The same as `answer`; None without an adapter.
        """
        policy = self.require_policy()
        if not has_adapter(policy):
            return None
        with adapters_off(policy):
            return self.answer(batch, dataloader_idx, batch_idx)

    def evaluate(self, dataloaders: Sequence[Any]) -> dict[str, float]:
        """Measure safety and general ability outside of a Trainer loop (before and after a fit).

        Args:
            dataloaders: Safety prompts, then general prompts.

        Returns:
            Metric name to rate, reduced over ranks.
        """
        rates = RateTable()
        for index, loader in enumerate(dataloaders):
            for batch_idx, batch in enumerate(loader):
                moved = self.trainer.strategy.batch_to_device(batch)
                rates.update(self._observe(moved, index, batch_idx), self.device)
        return rates.compute(self.device)

    def text_sums(self, batch: Mapping[str, Any]) -> TextSums:
        """Score a batch of given text, and how far the policy is from the base on it; see `score_text`.

        Args:
            batch: `input_ids`, `attention_mask` and maybe `labels_mask`, shape (rows, tokens).

        Returns:
            Sums over the scored tokens of this rank.
        """
        return score_text(self.require_policy(), batch)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        columns = batch.get("columns", {})
        sampling = self.evaluation_sampling if dataloader_idx == 0 else self.general_sampling
        places = places_among_ranks(len(batch["prompt_ids"])) if sampling.temperature > 0 else None
        rollout, texts = self.generate(batch, sampling, 1, EVALUATION_SEED + batch_idx, places)
        result = self.reward(batch["prompt"], texts, columns, completion_ids=completion_token_ids(rollout))
        rewards = result.total.tolist()
        outcomes = self.classify(batch["prompt"], texts, columns)
        return [
            {"prompt": prompt, "completion": text, "reward": None if reward != reward else reward, "outcome": outcome}
            for prompt, text, reward, outcome in zip(batch["prompt"], texts, rewards, outcomes, strict=True)
        ]

    # ------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A callback may have frozen some since (`freeze_down`): they were moved before that, and a resume needs them.
        names = self._trained | self._trainable_names()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in names}
        checkpoint[STATE_KEY] = {"policy": self.fingerprint, "policy_path": self.policy_settings.path}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the policy and refuse a checkpoint that is not of it.

        Args:
            checkpoint: Its content.

        Raises:
            PolicyError: If base or adapter are others.
        """
        state = checkpoint.get(STATE_KEY)
        if state is None:
            raise PolicyError("The checkpoint was not written by this project. Give one from a run's `checkpoints/`.")
        self.configure_model()
        if state["policy"] != self.fingerprint:
            raise PolicyError(
                f"The checkpoint belongs to another model: it was trained on '{state['policy_path']}' (fingerprint "
                f"{state['policy']}), and `policy.path` is '{self.policy_settings.path}' ({self.fingerprint}). "
                "Give the checkpoint's own base, with the same quantization and dtype."
            )
        names = self._trained | self._trainable_names()
        mine = {name: tuple(p.shape) for name, p in self.named_parameters() if name in names}
        found = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if mine != found:
            odd = sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name))[0]
            raise PolicyError(
                f"The checkpoint's adapter does not fit this one: '{odd}' has shape {found.get(odd)} there and "
                f"{mine.get(odd)} here. Use the `policy.lora` settings that it was trained with (they stand in the "
                "config.yaml of its run)."
            )


def completion_token_ids(rollout: Rollout) -> list[list[int]]:
    """List the generated tokens of each completion.

    Args:
        rollout: R completions.

    Returns:
        R lists of token ids, without padding.
    """
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
