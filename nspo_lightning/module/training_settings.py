"""The settings of training, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field

from nspo_lightning.grpo import AdvantageScale, ObjectiveConfig
from nspo_lightning.module.dynamic import DynamicSampling
from nspo_lightning.module.guided import GuidedSampling
from nspo_lightning.module.prefixes import PrefixSettings
from nspo_lightning.rollout import SamplingConfig
from nspo_lightning.rollout.server_config import IMPORTANCE_CAP, ServerSettings


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Arguments of `GRPOModule` under the same names; they are described there."""

    group_size: int
    sampling: SamplingConfig
    objective: ObjectiveConfig
    scale_rewards: AdvantageScale
    num_iterations: int
    num_minibatches: int
    tokens_per_microbatch: int | None
    max_nonfinite_updates: int
    max_unscored_rollouts: int
    max_rollouts_without_signal: int | None
    dynamic_sampling: DynamicSampling | None
    guided: GuidedSampling | None
    rollout_server: ServerSettings | None
    prefixes: PrefixSettings = field(default_factory=PrefixSettings)

    @property
    def steps_a_rollout(self) -> int:
        """Training steps that one rollout feeds."""
        return self.num_iterations * self.num_minibatches

    @property
    def importance_cap(self) -> float:
        """Upper bound of the importance ratio of tokens that a server or a merged copy drew, not the policy itself."""
        return IMPORTANCE_CAP if self.rollout_server is None else self.rollout_server.importance_cap

    def __post_init__(self) -> None:
        """Check the values; one that is out of its range raises ValueError."""
        if self.group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2, got {self.group_size}: an advantage compares a completion with the "
                "others of its group. 8 is a good start."
            )
        limits = ("max_nonfinite_updates", "max_unscored_rollouts")
        for name in ("num_iterations", "tokens_per_microbatch", "num_minibatches", *limits):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.max_rollouts_without_signal is not None and self.max_rollouts_without_signal < 0:
            raise ValueError(
                "`max_rollouts_without_signal` must be at least 1, or null (or 0) for no limit, got "
                f"{self.max_rollouts_without_signal}."
            )
        if self.dynamic_sampling is not None and self.rollout_server is not None and self.rollout_server.overlap:
            raise ValueError(
                "`dynamic_sampling` and `rollout_server.overlap` do not go together: the next batch would be drawn "
                "before it is known which prompts this one takes. Set `rollout_server.overlap: false`, or "
                "`dynamic_sampling: null`."
            )
        if self.sampling.temperature <= 0:
            raise ValueError(
                f"`sampling.temperature` must be positive in training, got {self.sampling.temperature}: greedy "
                "completions of one prompt are all the same, so no group would ever have a signal."
            )
