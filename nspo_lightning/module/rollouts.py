"""Where training completions come from: this process, or a server that has the adapter sent after each update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.grpo import Rollout
from nspo_lightning.module.ahead import Ahead
from nspo_lightning.module.guided import Guidance, joined
from nspo_lightning.module.text_policy import PREFIX_IDS, TextPolicy
from nspo_lightning.module.training_settings import TrainingSettings
from nspo_lightning.rollout.places import places_among_ranks
from nspo_lightning.rollout.server import RolloutServer
from nspo_lightning.rollout.server_client import RolloutServerError
from nspo_lightning.rollout.server_config import ServerSettings
from nspo_lightning.rollout.texts import completion_texts

SAMPLER_DIFFERENCE = "sampling/sampling_logp_difference/mean"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Completions of a batch of P prompts.

    Attributes:
        rollout: R = P * G completions; with log-probabilities if another program or a merged copy drew them.
        texts: The completions as text.
        update: Updates that the policy that drew them had taken.
    """

    rollout: Rollout
    texts: list[str]
    update: int = 0


class Rollouts(Protocol):
    """Draws training completions; all ranks call it together. The checks do nothing unless a class overrides them."""

    guidance: Guidance
    """Says which part of each group is drawn under another prompt."""

    def check_start(self, strategy: Strategy) -> None:
        """Check at the start of a run that completions can be drawn, before any long work."""
        return

    def draw(self, batch: Mapping[str, Any], seed: int, update: int, ahead: Ahead | None = None) -> Drawn:
        """Answer each prompt of a batch (`prompt_ids` (P, L), left-padded, and `prompt_mask`) with a group.

        `seed` is that of the noise, the same on all ranks; `update` the number of the optimizer's updates so far;
        `ahead` what `ask` returned for this batch, or for none.
        """

    def ask(self, batch: Mapping[str, Any], seed: int, update: int) -> Ahead | None:
        """Begin to answer the batch that comes next by the policy as it is now; None = it is answered when it comes."""
        return None

    def stop(self) -> None:
        """Cancel requests that are under way: their completions will not be used."""
        return

    def check_means(self, means: Mapping[str, Tensor]) -> None:
        """Check by a step's metrics that the completions were drawn by this policy."""
        return


@dataclass(frozen=True)
class LocalRollouts(Rollouts):
    """Draws completions in this process."""

    policy: TextPolicy
    settings: TrainingSettings
    guidance: Guidance

    def draw(self, batch: Mapping[str, Any], seed: int, update: int, ahead: Ahead | None = None) -> Drawn:
        """See `Rollouts.draw`."""
        sampling, guided = self.settings.sampling, self.settings.guided is not None
        places = places_among_ranks(len(batch["prompt_ids"]))
        parts = [
            self.policy.generate(part.batch, sampling, part.group_size, seed, part.places, with_log_probs=guided)
            for part in self.guidance.parts(batch, self.settings.group_size, places)
        ]
        rollout, texts = joined([part for part, _ in parts]), parts[0][1]
        if len(parts) > 1:
            texts = completion_texts(self.policy.tokenizer, rollout, sampling, batch.get(PREFIX_IDS))
        return Drawn(rollout=rollout, texts=texts, update=update)


@dataclass
class ServerRollouts(Rollouts):
    """Draws completions on a server. All ranks go on, or all raise `RolloutServerError`."""

    policy: TextPolicy
    settings: TrainingSettings
    guidance: Guidance
    server: RolloutServer
    warned: bool = False

    def check_start(self, strategy: Strategy) -> None:
        """See on rank 0 for all that the server can draw for this policy; the error says how to mend what is wrong."""
        settings, problem = self.policy.settings, ""
        self.server.client.start()
        if settings.lora is None:
            problem = (
                "`rollout_server` needs an adapter, which alone travels (`policy.lora` is null). Give `policy.lora`."
            )
        elif settings.merge_adapter:
            problem = (
                "`policy.merge_adapter` changes the base in this process alone, and the server would not know. Save "
                "the merged model, serve that, and name it in `policy.path`."
            )
        elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            problem = (
                "`rollout_server` works with one device and with DDP, where each process has the whole adapter, not "
                f"with {type(strategy).__name__}. Set `trainer.strategy: ddp`."
            )
        elif ranks.rank() == 0:
            try:
                self.server.check(self.settings.sampling)
            except RolloutServerError as error:
                problem = str(error)
        _raise(ranks.broadcast_object(problem, 0))

    def draw(self, batch: Mapping[str, Any], seed: int, update: int, ahead: Ahead | None = None) -> Drawn:
        """Take what was asked for ahead, or publish the adapter as it is and have the server answer now."""
        if ahead is not None and ranks.any_rank(not ahead.is_of(batch, seed, update)):
            # An epoch was cut short, other data came, or the weights that draw it were taken back.
            ahead.answer.exception()  # its adapter is in use until then
            ahead = None
        work, answered, problem = None if ahead else self._work(batch, seed, update), None, ""
        try:
            answered = work() if work is not None else ahead.answer.result() if ahead is not None else None
        except RolloutServerError as error:
            problem = str(error)
        _raise(next((one for one in ranks.gather_objects(problem) if one), ""))
        assert answered is not None  # nobody had a problem
        texts = completion_texts(self.policy.tokenizer, answered, self.settings.sampling, batch.get(PREFIX_IDS))
        return Drawn(rollout=answered, texts=texts, update=update if ahead is None else ahead.update)

    def ask(self, batch: Mapping[str, Any], seed: int, update: int) -> Ahead | None:
        """Publish the adapter as it is, and have the server answer in the background; see `Rollouts.ask`."""
        if not self.server.settings.overlap:
            return None
        return Ahead.begin(self._work(batch, seed, update), batch["prompt_ids"], seed, update)

    def stop(self) -> None:
        """Send no request any more, until `check_start`."""
        self.server.client.stop()

    def _work(self, batch: Mapping[str, Any], seed: int, update: int) -> Callable[[], Rollout]:
        """Do what all ranks must do together, and return what each then does alone."""
        places = places_among_ranks(len(batch["prompt_ids"]))
        model = self.policy.require()
        parts = self.guidance.parts(batch, self.settings.group_size, places)
        for part in parts:
            self.policy.check_room(part.batch["prompt_ids"].shape[1], self.settings.sampling.max_new_tokens)
        draw = partial(
            self.server.sample,
            self._publish(model, update),
            config=self.settings.sampling,
            eos_token_ids=self.policy.end_ids(self.settings.sampling),
            pad_token_id=int(self.policy.tokenizer.pad_token_id),
            vocab_size=int(model.get_input_embeddings().weight.shape[0]),
            seed=seed,
        )

        def work() -> Rollout:
            return joined([
                draw(
                    part.batch["prompt_ids"],
                    part.batch["prompt_mask"],
                    group_size=part.group_size,
                    prompt_places=part.places,
                )
                for part in parts
            ])

        return work

    def _publish(self, model: Any, update: int) -> str:
        name = problem = ""
        if ranks.rank() == 0:  # one writes, and the others wait in the broadcast
            try:
                name = self.server.publish(model, update)
            except RolloutServerError as error:
                problem = str(error)
        name, problem = ranks.broadcast_object((name, problem), 0)
        _raise(problem)
        return name

    def check_means(self, means: Mapping[str, Tensor]) -> None:
        """See whether the server's log-probabilities are those of this policy."""
        if SAMPLER_DIFFERENCE not in means:  # drawn before the run was resumed with a server
            return
        settings, difference = self.server.settings, float(means[SAMPLER_DIFFERENCE])
        if ranks.any_rank(difference > settings.max_logp_difference):
            raise RolloutServerError(
                f"The server's log-probabilities differ from the trainer's by {difference:.3g} nats a token in the "
                f"mean (`rollout_server.max_logp_difference` is {settings.max_logp_difference:g}): it serves another "
                "base, or applies another adapter. Nothing was learnt from these completions. Compare the two models' "
                f"folders, quantisation and revision.{_other_cause(settings)}"
            )
        if difference > settings.warn_logp_difference and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"The server's log-probabilities differ from the trainer's by {difference:.3g} nats a token in the "
                "mean. The importance ratio corrects it at the price of noise. Likely causes: another quantisation or "
                "dtype of the base, or `--logprobs-mode raw_logprobs` with a temperature other than 1."
                + _other_cause(settings)
            )


class StopOnException(Callback):
    """Ends what is under way when a run ends by an exception or a signal."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.rollouts.stop()


def make_rollouts(policy: TextPolicy, settings: TrainingSettings) -> Rollouts:
    """Choose where completions come from: the server, if there is one, else this process."""
    guidance = Guidance(policy, settings.guided)
    if settings.rollout_server is None:
        return LocalRollouts(policy, settings, guidance)
    return ServerRollouts(policy, settings, guidance, RolloutServer(settings.rollout_server))


def _raise(problem: str) -> None:
    if problem:
        raise RolloutServerError(problem)


def _other_cause(settings: ServerSettings) -> str:
    """Say what else may be the cause of a difference."""
    late = " Or an update moves the policy far: completions are drawn by the one before it (`rollout_server.overlap`)."
    return late if settings.overlap else ""
