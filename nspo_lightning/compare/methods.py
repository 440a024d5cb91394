"""The methods of a comparison: each is the same module and callback with a few settings changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nspo_lightning.datamodules import PromptSource
from nspo_lightning.datamodules.sources.opening import is_builtin

KL_COEF = 0.04
"""beta of the methods with a KL penalty: DeepSeekMath's (arXiv 2402.03300, section 4.2)."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What a run of a method changes."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Option of `fit` to value."""
    callbacks: Sequence[Mapping[str, Any]] = ()
    """Callbacks beside those of every run, as in a configuration."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    label: str
    """What tables and pictures call it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Option of `fit` to value."""
    trains: bool = True
    """False: the policy is only measured."""
    mixes_general: bool = False
    """True: general prompts are half of each batch, rewarded for their answers."""
    variants: Mapping[str, Extra] = field(default_factory=dict)
    """What tables call it -> what else is changed, for a method with a coefficient: each is compared on its own."""
    extra: Extra = field(default_factory=lambda: Extra())
    """What else every run of it has."""

    def runs(self) -> list[tuple[str, Extra]]:
        """List (variant's label, all that is changed); the label is empty where there are no variants."""
        return [
            (label, Extra(settings={**self.settings, **more.settings}, callbacks=more.callbacks))
            for label, more in (self.variants or {"": self.extra}).items()
        ]


KL_COEFFICIENTS = (0.1, 1.0, 10.0, 100.0)
"""Of the penalty on general text."""
ANCHOR_COEFFICIENTS = (10.0, 100.0, 1000.0)
"""Of the same penalty to second order."""
DECAYS = (0.1, 0.3, 1.0)
"""AdamW's, on A and B."""
LEARN_DIRECTIONS = 4
"""Leading eigenvectors of safety's inputs that A is started in."""
LEARNING_RATES = (0.5, 1.0, 2.0, 4.0)
"""The grid of every method, in units of the configuration's rate: what wins at one rate may win by its size alone."""


def _callback(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"nspo_lightning.callbacks.{name}", "init_args": init_args}


def _by_coefficient(label: str, callback: str, coefficients: Sequence[float]) -> dict[str, Extra]:
    """Return a variant for each coefficient of a callback, called `label` with `{}` in the coefficient's place."""
    return {label.format(f"{c:g}"): Extra(callbacks=[_callback(callback, coefficient=c)]) for c in coefficients}


_ON_STARTS = Extra(callbacks=[_callback("GeneralKL", coefficient=2.0, rows=32, start_weight=1.0)])
"""A penalty on the starts of answers alone, which are short."""
_SPLITS = {"val": "validation", "test": "test"}
_OFF = {"nullspace.enabled": False}
_CONTRAST = {"nullspace.criterion": "contrast"}
_FREE = {"nullspace.project_gradients": False, "nullspace.project_displacement": False}

METHODS: dict[str, Method] = {
    "base": Method(label="base", settings=_OFF, trains=False),
    "grpo_kl": Method(label="GRPO + KL", settings={**_OFF, "model.objective.beta": KL_COEF}),
    "grpo": Method(label="GRPO", settings=_OFF),
    "grpo_mixed": Method(label="GRPO, general prompts mixed in", settings=_OFF, mixes_general=True),
    "nspo": Method(label="NSPO"),
    "nspo_kl": Method(label="NSPO + KL", settings={"model.objective.beta": KL_COEF}),
    "random": Method(label="random subspace", settings={"nullspace.subspace": "random"}),
    "weights": Method(
        label="subspace of the weights", settings={"nullspace.subspace": "weights", "nullspace.criterion": "auto"}
    ),
    "protected": Method(label="protected subspace", settings={"nullspace.subspace": "protected"}),
    "gradient": Method(
        label="gradient projection alone",
        settings={"nullspace.project_initialization": False, "nullspace.project_displacement": False},
    ),
    "displacement": Method(
        label="displacement projection alone",
        settings={"nullspace.project_initialization": False, "nullspace.project_gradients": False},
    ),
    "b_only": Method(label="B only", settings={"nullspace.freeze_down": True}),
    "soft": Method(label="soft", settings={"nullspace.form": "soft"}),
    "contrast": Method(label="NSPO, contrast", settings=_CONTRAST),
    "nspo_mixed": Method(label="NSPO, general prompts mixed in", mixes_general=True),
    "contrast_mixed": Method(
        label="NSPO, contrast, general prompts mixed in",
        settings=_CONTRAST,
        mixes_general=True,
    ),
    "nspo_general_kl": Method(
        label="NSPO + KL on general text",
        variants=_by_coefficient("NSPO + {} KL on general text", "GeneralKL", KL_COEFFICIENTS[1:]),
    ),
    "contrast_kl": Method(
        label="NSPO, contrast + KL on general text",
        settings=_CONTRAST,
        variants=_by_coefficient("NSPO, contrast + {} KL on general text", "GeneralKL", KL_COEFFICIENTS[1:]),
    ),
    "contrast_starts": Method(label="NSPO, contrast + KL on starts of answers", settings=_CONTRAST, extra=_ON_STARTS),
    "nspo_starts": Method(label="NSPO + KL on starts of answers", extra=_ON_STARTS),
    "general_starts": Method(label="GRPO + KL on starts of answers", settings=_OFF, extra=_ON_STARTS),
    "general_kl": Method(
        label="GRPO + KL on general text",
        settings=_OFF,
        variants=_by_coefficient("GRPO + {} KL on general text", "GeneralKL", KL_COEFFICIENTS),
    ),
    "anchor": Method(
        label="GRPO + curvature anchor",
        settings=_OFF,
        variants=_by_coefficient("GRPO + curvature anchor {}", "CurvatureAnchor", ANCHOR_COEFFICIENTS),
    ),
    "nspo_anchor": Method(
        label="NSPO + curvature anchor",
        variants=_by_coefficient("NSPO + curvature anchor {}", "CurvatureAnchor", ANCHOR_COEFFICIENTS[1:]),
    ),
    "nspo_anchor_starts": Method(
        label="NSPO + curvature anchor 100, half on starts of answers",
        extra=Extra(callbacks=[_callback("CurvatureAnchor", coefficient=100.0, start_weight=0.5)]),
    ),
    "nspo_anchor_mixed": Method(
        label="NSPO + curvature anchor 100, general prompts mixed in",
        mixes_general=True,
        extra=Extra(callbacks=[_callback("CurvatureAnchor", coefficient=100.0)]),
    ),
    "contrast_anchor": Method(
        label="NSPO, contrast + curvature anchor",
        settings=_CONTRAST,
        variants=_by_coefficient("NSPO, contrast + curvature anchor {}", "CurvatureAnchor", ANCHOR_COEFFICIENTS[1:]),
    ),
    "decay": Method(
        label="GRPO, weight decay",
        settings=_OFF,
        variants={
            f"GRPO, weight decay {decay:g}": Extra(settings={"model.optimizer.init_args.weight_decay": decay})
            for decay in DECAYS
        },
    ),
    "init_only": Method(label="start in the null space, then free", settings=_FREE),
    "init_contrast": Method(
        label="start where safety's inputs are, then free",
        settings={
            "nullspace.subspace": "to_learn",
            "nullspace.criterion": "rank",
            "nullspace.threshold": LEARN_DIRECTIONS,
            **_FREE,
        },
    ),
    "ogpsa": Method(label="OGPSA", settings=_OFF, extra=Extra(callbacks=[_callback("OGPSA")])),
}
"""Method by name, in the order of tables. What is not changed is the configuration's own."""


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings, option to value, as the arguments of `fit`.

    Example:
        >>> as_arguments({"nullspace.enabled": False, "data.batch_size": 4})
        ['--nullspace.enabled=false', '--data.batch_size=4']
    """
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def mixing_settings(config: Mapping[str, Any], reward: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings that mix general prompts into the batches, as many as safety prompts, with a reward for both.

    Args:
        config: The configuration: `model.reward` and `data.safety`, `data.general`.
        reward: The reward of the mixture; None = the configuration's on harmful prompts, and 1 or -1 for right and
            wrong answers to general ones (`SafetyAndAnswers`).

    Raises:
        ValueError: If the mixture would change what is evaluated.
    """
    data = config["data"]
    safety, general = as_dicts(data["safety"]), as_dicts(data["general"])
    held_out = {f"data.safety_{part}": data.get(f"safety_{part}") for part in ("val", "test")}
    if all(is_builtin(PromptSource(**source)) for source in safety):  # such a world has splits of its own
        held_out = {f"data.safety_{part}": [{**s, "split": split} for s in safety] for part, split in _SPLITS.items()}
    elif not all(held_out.values()):
        raise ValueError(
            "`grpo_mixed` and `contrast_mixed` add general prompts to `data.safety`, and what is held out of it must "
            "stay the same: give the configuration `data.safety_val` and `data.safety_test`, or leave these methods "
            "out of `--methods`."
        )
    mixture = [{**source, "weight": 1.0 / len(safety)} for source in safety]
    mixture += [{**source, "kind": "benign", "weight": 1.0 / len(general)} for source in general]
    reward = reward or {
        "class_path": "nspo_lightning.rewards.SafetyAndAnswers",
        "init_args": {"safety": config["model"]["reward"]},
    }
    return {"data.safety": mixture, "model.reward": dict(reward), **held_out}


def as_dicts(sources: Any) -> list[dict[str, Any]]:
    """Write a configuration's sources (a path, a source, or a list of either) as a list of sources' settings."""
    entries = sources if isinstance(sources, list) else [sources]
    return [{"path": entry} if isinstance(entry, str) else dict(entry) for entry in entries]
