"""Checks at the start of a run: strategy, accumulation, ends of completions and optimizer must suit the settings."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from nspo_lightning.compat.lightning import callbacks_of, process_group_timeout
from nspo_lightning.module.collector import Collected
from nspo_lightning.module.text_policy import TextPolicy
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.rewards import RewardSet
from nspo_lightning.rollout import SamplingConfig


def check_strategy(trainer: pl.Trainer, reward: RewardSet) -> None:
    """Check that each rank can sample on its own, and that the others wait long enough for its rewards.

    Raises:
        MisconfigurationException: If weights are sharded, or if a slow reward would exceed the strategy's timeout.
    """
    strategy = trainer.strategy
    if _shards_weights(strategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the policy's weights, which all processes must then gather together at "
            "every forward pass, but each samples completions of its own and they end at different times: the "
            "processes would wait for one another for ever. Set `trainer.strategy: ddp`; a policy that is too large "
            "for one device in 16 bits fits with `policy.quantization: nf4` (docs/scaling.md)."
        )
    limit, patience = reward.timeout_s, process_group_timeout(strategy)
    if trainer.world_size == 1 or patience is None:
        return
    seconds, number = patience.total_seconds(), len(reward.rewards)
    if limit is None or limit * number >= seconds:
        takes = "without end (`timeout_s: null`)" if limit is None else f"{number} x `timeout_s` = {limit * number:g} s"
        raise MisconfigurationException(
            f"The rewards may take {takes}, but the other processes wait no longer than the strategy's timeout of "
            f"{seconds:g} s for the one that they run in. Raise the `timeout` of {type(strategy).__name__} (1800 s "
            "by default), or set `timeout_s` of the RewardSet lower."
        )


def check_accumulation(trainer: pl.Trainer, settings: TrainingSettings) -> None:
    """Refuse a changing number of accumulated batches where a rollout feeds several updates."""
    changing = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))
    if changing and settings.steps_a_rollout > 1:
        raise MisconfigurationException(
            f"GradientAccumulationScheduler changes how many batches make an update, and the order of batches in which "
            f"a rollout feeds {settings.steps_a_rollout} updates (`num_iterations` x `num_minibatches`) is made for "
            "one number. Set `trainer.accumulate_grad_batches` instead, or `num_iterations: 1, num_minibatches: 1`."
        )


def warn_if_none_ended(collected: Collected, policy: TextPolicy, sampling: SamplingConfig) -> None:
    """Warn where all completions of the first rollout ran to the limit: the policy may end turns in another way."""
    if float(collected.metrics["completions/clipped_ratio"]) < 1:
        return
    known = ", ".join(repr(policy.tokenizer.convert_ids_to_tokens(token)) for token in policy.end_ids(sampling))
    rank_zero_warn(
        f"All completions of the first rollout ran to `sampling.max_new_tokens` ({sampling.max_new_tokens}): none came "
        f"to a token that ends it ({known}). One ends with {collected.judged.completions[0][-80:]!r}. If that is an "
        "answer cut short, raise `sampling.max_new_tokens`; if the policy has begun another turn, name the token or "
        "the text that ends its turns in `sampling.stop_token_ids` or `sampling.stop_strings`."
    )


def make_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Make the optimizer; MisconfigurationException says which settings it refuses, in its own words."""
    try:
        return make(parameters)
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(
            f"`model.optimizer` refuses its settings: {error}. Mend it (as `model.optimizer.init_args.lr`)."
        ) from error


def check_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Try the optimizer's settings on a small matrix before the model is loaded.

    Only what torch's own optimizers refuse is refused: others may want parameters that they know.

    Raises:
        MisconfigurationException: If a setting is out of its range.
    """
    try:
        make_optimizer(make, [nn.Parameter(torch.zeros(2, 2))])
    except MisconfigurationException as error:
        frames = traceback.extract_tb(None if error.__cause__ is None else error.__cause__.__traceback__)
        if frames and Path(frames[-1].filename).is_relative_to(Path(torch.optim.__file__).parent):
            raise
    except Exception:  # what it wants is seen when it gets the real parameters
        return


def _shards_weights(strategy: Strategy) -> bool:
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
