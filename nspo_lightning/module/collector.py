"""From a batch of prompts to experience: completions from this process or from a server, rewards, advantages.

Everything here happens without gradient, before a training step learns from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nspo_lightning import ranks
from nspo_lightning.grpo import (
    AdvantageScale,
    MicroBatch,
    ObjectiveConfig,
    ObjectiveMetrics,
    Rollout,
    group_advantages,
    split_microbatches,
)
from nspo_lightning.module.experience import Experience, ExperienceBuffer
from nspo_lightning.module.policy_module import PolicyModule, completion_token_ids
from nspo_lightning.module.rollout_metrics import JudgedRows, rollout_metrics
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.scoring import score_completions
from nspo_lightning.policy.settings import PolicyError
from nspo_lightning.policy.sharing import can_share_prompts
from nspo_lightning.policy.tokenizer import stop_token_ids
from nspo_lightning.rewards import Judge, RewardSet, RulesJudge
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.places import Places, places_among_ranks
from nspo_lightning.rollout.server import RolloutServer
from nspo_lightning.rollout.server_client import RolloutServerError

SAMPLER_DIFFERENCE = "sampling/sampling_logp_difference/mean"


class CollectingModule(PolicyModule):
    """A policy module that rolls out and judges; `GRPOModule` adds learning, and sets what is declared here."""

    group_size: int
    sampling: SamplingConfig
    objective: ObjectiveConfig
    scale_rewards: AdvantageScale
    num_iterations: int
    num_minibatches: int
    tokens_per_microbatch: int | None
    rollouts: int
    num_tokens: int
    last_completions: dict[str, list[Any]]
    server: RolloutServer | None
    _seed: int
    _warned_of_sampler = False

    def _collect(self, batch: Mapping[str, Any]) -> ExperienceBuffer:
        """Roll out, judge, compare: a batch of P prompts becomes experience of P * G completions."""
        group = self.group_size
        seed, prompt_places = self._seed * 1_000_003 + self.rollouts, places_among_ranks(len(batch["prompt_ids"]))
        sampling_log_probs = None
        if self.server is None:
            rollout, texts = self.generate(batch, self.sampling, group, seed, prompt_places)
        else:
            rollout, texts, sampling_log_probs = self._from_server(self.server, batch, seed, prompt_places)
        prompts = [prompt for prompt in batch["prompt"] for _ in range(group)]
        columns = {
            key: [value for value in values for _ in range(group)] for key, values in batch.get("columns", {}).items()
        }
        result = self.reward(prompts, texts, columns, completion_ids=completion_token_ids(rollout))
        # A reward made from a judge's outcomes reports them: a guard model need not judge everything twice.
        reported = [values for column, values in result.extra.items() if column.endswith("/outcome")]
        outcomes = reported[0] if reported else self.classify(prompts, texts, columns)
        self.rollouts += 1
        everyone = JudgedRows.of(rollout, result, outcomes).of_all_ranks()
        self.num_tokens += everyone.num_tokens(group)
        self.last_completions = {
            "prompt": prompts,
            "completion": texts,
            "reward": result.total.tolist(),
            "outcome": list(outcomes),
            **{name: values for name, values in result.extra.items() if len(values) == len(texts)},
        }
        self._log_step({**rollout_metrics(everyone, group), "num_tokens": float(self.num_tokens)})
        experience = Experience(
            rollout=rollout,
            advantages=group_advantages(
                result.total, group, self.scale_rewards, batch_rewards=everyone.rewards.total
            ).to(self.device),
            old_log_probs=self._score_without_grad(rollout) if self.num_minibatches > 1 else None,
            reference_log_probs=self._reference_log_probs(rollout),
            sampling_log_probs=sampling_log_probs,
        )
        return ExperienceBuffer(experience, self.num_minibatches, self.num_iterations)

    # ------------------------------------------------------------------ a server's completions

    def _from_server(
        self, server: RolloutServer, batch: Mapping[str, Any], seed: int, prompt_places: Places
    ) -> tuple[Rollout, list[str], Tensor]:
        """Publish the adapter as it is and have it answer. All ranks go on, or all raise.

        Returns:
            The rollout, its texts, and the log-probabilities that its tokens were drawn with, shape (P * G, C).

        Raises:
            RolloutServerError: If the server failed any rank.
        """
        policy = self.require_policy()
        self.check_room(batch["prompt_ids"].shape[1], self.sampling.max_new_tokens)
        name, problem = "", ""
        if self.global_rank == 0:  # one writes, and the others wait in the broadcast
            try:
                name = server.publish(policy, self.trainer.global_step)
            except RolloutServerError as error:
                problem = str(error)
        name, problem = self.trainer.strategy.broadcast((name, problem))
        if problem:
            raise RolloutServerError(problem)
        answered = None
        try:
            answered = server.sample(
                name,
                batch["prompt_ids"],
                batch["prompt_mask"],
                group_size=self.group_size,
                config=self.sampling,
                eos_token_ids=stop_token_ids(policy, self.tokenizer),
                pad_token_id=int(self.tokenizer.pad_token_id),
                vocab_size=int(policy.get_input_embeddings().weight.shape[0]),
                seed=seed,
                prompt_places=prompt_places,
            )
        except RolloutServerError as error:
            problem = str(error)
        if self._distributed:
            problems: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(problems, problem)
            problem = next((one for one in problems if one), "")
        if problem or answered is None:
            raise RolloutServerError(problem)
        rollout, log_probs = answered
        texts = self.tokenizer.batch_decode(completion_token_ids(rollout), skip_special_tokens=True)
        return rollout, texts, log_probs

    def _check_sampler(self, means: Mapping[str, Tensor]) -> None:
        """Look whether the server's log-probabilities are those of this policy.

        Raises:
            RolloutServerError: If they can't be.
        """
        if self.server is None or SAMPLER_DIFFERENCE not in means:
            return
        settings, difference = self.server.settings, float(means[SAMPLER_DIFFERENCE])
        if self._any_rank(difference > settings.max_logp_difference):
            raise RolloutServerError(
                f"The server's log-probabilities differ from the trainer's by {difference:.3g} nats a token in the "
                f"mean (`rollout_server.max_logp_difference` is {settings.max_logp_difference:g}): it serves another "
                "base, or applies another adapter. Nothing was learnt from these completions. Compare the two models' "
                "folders, quantisation and revision."
            )
        if difference > settings.warn_logp_difference and not self._warned_of_sampler:
            self._warned_of_sampler = True
            rank_zero_warn(
                f"The server's log-probabilities differ from the trainer's by {difference:.3g} nats a token in the "
                "mean. The importance ratio corrects it at the price of noise. Likely causes: another quantisation or "
                "dtype of the base, or `--logprobs-mode raw_logprobs` with a temperature other than 1."
            )

    # ------------------------------------------------------------------ scores

    def _split(self, rollout: Rollout) -> list[MicroBatch]:
        model = self.require_policy()
        shares = self.share_prefix and can_share_prompts(getattr(model, "get_base_model", lambda: model)())
        return split_microbatches(rollout, self.tokens_per_microbatch, share_prefix=shares)

    def _score_without_grad(self, rollout: Rollout) -> Tensor:
        scores = torch.zeros(rollout.completion_ids.shape, device=self.device)
        with evaluation_mode(self.require_policy()), torch.no_grad():
            for micro in self._split(rollout):
                part = score_completions(
                    self.require_policy(),
                    micro.rollout,
                    temperature=self.sampling.temperature,
                    share_prefix=self.share_prefix,
                )
                scores[micro.rows.to(scores.device), : part.log_probs.shape[1]] = part.log_probs
        return scores

    def _reference_log_probs(self, rollout: Rollout) -> Tensor | None:
        if self.objective.beta == 0:
            return None
        if not hasattr(self.require_policy(), "disable_adapter"):
            raise PolicyError(
                f"`objective.beta` is {self.objective.beta}, and the reference is the policy with its adapter off, but "
                "there is no adapter (`policy.lora: null`). Set `objective.beta: 0`, or train an adapter."
            )
        with self.require_policy().disable_adapter():
            return self._score_without_grad(rollout)

    # ------------------------------------------------------------------ logs and ranks

    def _log_step(self, values: Mapping[str, Any], *, mean_over_ranks: bool = False) -> None:
        """Log values that are the same on all ranks already, or their mean over ranks."""
        reduce = mean_over_ranks and self._distributed
        for name, value in values.items():
            on_bar = name in {"reward", "unsafe"}
            self.log(name, value, on_step=True, on_epoch=False, prog_bar=on_bar, sync_dist=reduce, batch_size=1)

    def _of_all_ranks(self, metrics: Sequence[ObjectiveMetrics]) -> ObjectiveMetrics:
        summed = ObjectiveMetrics.merge(metrics)
        return ObjectiveMetrics.merge(ranks.gather_objects(summed.to("cpu"))) if self._distributed else summed

    @property
    def _distributed(self) -> bool:
        return self.trainer.world_size > 1

    def _any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: all ranks must agree to run the backward pass, or none."""
        if self.trainer.world_size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor)


def check_start(module: CollectingModule) -> None:
    """See at the start of a run that ranks can work apart and wait long enough, and that a server can draw.

    Args:
        module: Whose run.

    Raises:
        MisconfigurationException: If weights are sharded, or a rank with a slow reward would be given up by the others.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) or getattr(strategy, "zero_stage_3", False):
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the policy's weights, which all processes must then gather together at "
            "every forward pass, but each samples completions of its own and they end at different times: the "
            "processes would wait for one another for ever. Set `trainer.strategy: ddp`; a policy that is too large "
            "for one device in 16 bits fits with `policy.quantization: nf4` (docs/scaling.md)."
        )
    limit, patience = module.reward.timeout_s, getattr(strategy, "_timeout", None)
    if module.trainer.world_size > 1 and patience is not None:
        seconds, number = patience.total_seconds(), len(module.reward.rewards)
        if limit is None or limit * number >= seconds:
            takes = (
                "without end (`timeout_s: null`)" if limit is None else f"{number} x `timeout_s` = {limit * number:g} s"
            )
            raise MisconfigurationException(
                f"The rewards may take {takes}, but the other processes wait no longer than the strategy's timeout of "
                f"{seconds:g} s for the one that they run in. Raise the `timeout` of {type(strategy).__name__} (1800 s "
                "by default), or set `timeout_s` of the RewardSet lower."
            )
    if module.server is not None:
        check_server(module, module.server)


def check_server(module: CollectingModule, server: RolloutServer) -> None:
    """See at the start of a run, on rank 0 for all, that a server can draw for this policy.

    Args:
        module: Whose policy.
        server: The server.

    Raises:
        RolloutServerError: Saying what is wrong and how to mend it.
    """
    settings, strategy = module.policy_settings, module.trainer.strategy
    problem = ""
    if settings.lora is None:
        problem = "`rollout_server` needs an adapter, which alone travels (`policy.lora` is null). Give `policy.lora`."
    elif settings.merge_adapter:
        problem = (
            "`policy.merge_adapter` changes the base in this process alone, and the server would not know. Save the "
            "merged model, serve that, and name it in `policy.path`."
        )
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        problem = (
            f"`rollout_server` works with one device and with DDP, where each process has the whole adapter, not with "
            f"{type(strategy).__name__}. Set `trainer.strategy: ddp`."
        )
    elif module.global_rank == 0:
        try:
            server.check(module.sampling)
        except RolloutServerError as error:
            problem = str(error)
    problem = strategy.broadcast(problem)
    if problem:
        raise RolloutServerError(problem)


def judge_of(reward: Any) -> Judge:
    """Find a judge in the reward: one of its parts that can judge, or that scores a judge's outcomes.

    Args:
        reward: A reward or a set of them.

    Returns:
        The first one found; without one, refusal patterns.
    """
    for part in reward.rewards if isinstance(reward, RewardSet) else [reward]:
        for candidate in (part, getattr(part, "judge", None)):
            if isinstance(candidate, Judge):
                return candidate
    return RulesJudge()
