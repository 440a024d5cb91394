"""What is to be run: settings by run, with names that sort, and what to call them in tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nspo_lightning.compare.methods import METHODS, as_arguments, mixing_settings
from nspo_lightning.terminal import counted

LEARNING_RATE = "model.optimizer.init_args.lr"
_RULES = ("steps", "stop_unsafe", "unsafe_limit", "metric", "higher_is_better")
"""What `Trajectory` is told that a report states."""
RESULT = "result.json"
"""What a finished run leaves in its folder."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The stopping rule, the same for all methods."""

    steps: int
    """Training steps at most, over as many epochs as it takes."""
    eval_every: int
    """Training steps between two evaluations."""
    stop_unsafe: float
    """A run ends once an evaluation's unsafe rate is at most this."""

    def sentence(self) -> str:
        """Say the rule."""
        return (
            f"a run ends at an unsafe rate of at most {self.stop_unsafe:g} on validation prompts, or after "
            f"{counted(self.steps, 'training step')}; evaluated every {counted(self.eval_every, 'step')}"
        )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run."""

    method: str
    seed: int
    learning_rate: float | None
    variant: str = ""
    """The swept setting's value, empty outside sweeps."""
    group: str = ""
    """Which line of a sweep's picture the variant belongs to."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Option of `fit` to value: the method's and the sweep's."""
    callbacks: Sequence[Mapping[str, Any]] = ()
    """The method's own, as in a configuration."""

    @property
    def is_projected(self) -> bool:
        """Whether a projection holds the run's updates while it trains."""
        steps = ("nullspace.project_gradients", "nullspace.project_displacement")
        enabled = self.settings.get("nullspace.enabled") is not False
        return enabled and any(self.settings.get(step) is not False for step in steps)

    @property
    def name(self) -> str:
        """Folder of the run."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        variant = f"-{_slug(self.variant)}" if self.variant else ""
        return f"{self.method}{variant}{rate}-seed{self.seed}"

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.variant or METHODS[self.method].label

    def arguments(self, config: Path, out: Path, budget: Budget, trajectory: Mapping[str, Any]) -> list[str]:
        """Write the run as a command line; `trajectory` holds arguments of `Trajectory` that all runs share."""
        trains = METHODS[self.method].trains
        own = {
            "result": str(out / "runs" / self.name / RESULT),
            "stop_unsafe": budget.stop_unsafe,
            "steps": budget.steps,
            "measure_start": not trains,
        }
        settings: dict[str, Any] = {
            "seed_everything": self.seed,
            "trainer.default_root_dir": str(out),
            "trainer.max_epochs": -1,
            "trainer.limit_train_batches": 1.0,
            "trainer.val_check_interval": budget.eval_every,
            "trainer.check_val_every_n_epoch": None,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_progress_bar": False,
            "trainer.logger": _named(
                "lightning.pytorch.loggers.TensorBoardLogger", save_dir=str(out / "runs"), name=self.name, version=""
            ),
            "trainer.callbacks": [
                _named("nspo_lightning.compare.trajectory.Trajectory", **own, **trajectory),
                _named("nspo_lightning.callbacks.GeneralText", text_rows=trajectory.get("text_rows", 0)),
                _named("nspo_lightning.callbacks.RunReport", evaluate=False),
                *self.callbacks,
            ],
            **({} if trains else {"trainer.max_steps": 0}),
            **self.settings,
        }
        if self.learning_rate is not None:
            settings[LEARNING_RATE] = self.learning_rate
        return ["fit", "-c", str(config), *as_arguments(settings)]

    def told(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return by which rules a run with these arguments stops and selects: options of `compare` to values."""
        settings = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments if "=" in argument)
        callbacks = json.loads(settings.get("trainer.callbacks", "[]"))
        own: dict[str, Any] = next((c["init_args"] for c in callbacks if c["class_path"].endswith(".Trajectory")), {})
        rules = {name: own[name] for name in _RULES if name in own}
        if "trainer.val_check_interval" in settings:
            rules["eval_every"] = json.loads(settings["trainer.val_check_interval"])
        return rules

    def digest(self, arguments: Sequence[str], config: Path, out: Path, files: Mapping[str, str] | None = None) -> str:
        """Hash what the run does: arguments, the configuration's content, that of other files; not where they are."""
        told = [a.replace(str(out), "OUT").replace(str(config), "CONFIG") for a in arguments]
        told += sorted((files or {}).values())
        return hashlib.sha256(json.dumps([told, config.read_text()]).encode()).hexdigest()[:16]


def main_grid(
    config: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    mixed_reward: Mapping[str, Any] | None = None,
) -> list[RunSpec]:
    """Return the runs of methods x seeds x rates: every method at the first seed and rate before any at the second.

    The base is measured once. The configuration and `mixed_reward` are for the mixture, see `mixing_settings`.

    Raises:
        ValueError: If a method is unknown.
    """
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"`methods` must be among {', '.join(METHODS)}, got {name!r}.")
    mixed = mixing_settings(config, mixed_reward) if any(METHODS[name].mixes_general for name in methods) else {}

    def specs(name: str, seed: int, rate: float | None) -> list[RunSpec]:
        more = mixed if METHODS[name].mixes_general else {}
        return [
            RunSpec(
                method=name,
                seed=seed,
                learning_rate=rate,
                variant=label,
                settings={**extra.settings, **more},
                callbacks=extra.callbacks,
            )
            for label, extra in METHODS[name].runs()
        ]

    base = [spec for name in methods if not METHODS[name].trains for spec in specs(name, seeds[0], None)]
    trained = [name for name in methods if METHODS[name].trains]
    return base + [spec for rate in rates for seed in seeds for name in trained for spec in specs(name, seed, rate)]


def as_planned(specs: Sequence[RunSpec], config: Mapping[str, Any]) -> list[RunSpec]:
    """Return the runs with the settings that make them what they are called, whatever the configuration has there.

    A configuration of plain GRPO has its null space off, so that NSPO would be GRPO under another name; its threshold
    is of its own criterion; and its `max_steps` or `max_time` would end runs before the budget says.
    """
    trainer, nullspace = config.get("trainer") or {}, config.get("nullspace") or {}
    off = nullspace.get("enabled") is False
    ends: dict[str, Any] = {} if trainer.get("max_steps") in (None, -1) else {"trainer.max_steps": -1}
    ends |= {} if trainer.get("max_time") is None else {"trainer.max_time": None}

    def more(spec: RunSpec) -> dict[str, Any]:
        own = dict(ends) if METHODS[spec.method].trains else {}
        if off:
            own["nullspace.enabled"] = True
        if nullspace.get("threshold") is not None and "nullspace.criterion" in spec.settings:
            own["nullspace.threshold"] = None
        return own

    return [replace(spec, settings={**more(spec), **spec.settings}) for spec in specs]


def _named(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._+" else "-" for c in text).strip("-").lower()
