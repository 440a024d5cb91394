"""What the paper's reviewers asked: the domain and size of K, the threshold, the amount of safety data, the rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nspo_lightning.compare.methods import METHODS, as_dicts
from nspo_lightning.compare.plan import RunSpec
from nspo_lightning.terminal import counted

Variant = tuple[str, str, str, dict[str, Any]]
"""Method, group, label, settings beside the method's own."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One question."""

    title: str
    question: str
    variants: Sequence[Variant]

    def plan(self, seeds: Sequence[int], rate: float | None) -> list[RunSpec]:
        """Return the base and every variant at every seed, all variants of a seed before the next seed."""
        base = RunSpec(method="base", seed=seeds[0], learning_rate=None, settings=METHODS["base"].settings)
        return [base] + [
            RunSpec(
                method=method,
                seed=seed,
                learning_rate=rate,
                variant=label,
                group=group,
                settings={**METHODS[method].settings, **settings},
            )
            for seed in seeds
            for method, group, label, settings in self.variants
        ]


def make_sweep(name: str, config: Mapping[str, Any], domains: Sequence[str]) -> Sweep:
    """Build a sweep; `domains` are those of the calibration text."""
    makers: dict[str, Callable[[], Sweep]] = {
        "calibration": lambda: _calibration(config, domains),
        "threshold": _threshold,
        "data": lambda: _data(config),
        "rank": _rank,
    }
    if name not in makers:
        raise ValueError(f"`sweep` must be calibration, threshold, data or rank, got {name!r}.")
    return makers[name]()


def _calibration(config: Mapping[str, Any], domains: Sequence[str]) -> Sweep:
    variants: list[Variant] = [("nspo", "all domains", "all", {})]
    if len(domains) > 1:
        for domain in domains:
            others = [d for d in domains if d != domain]
            variants.append(("nspo", "one domain", f"only {domain}", {"nullspace.without_domains": others}))
            variants.append(("nspo", "one left out", f"without {domain}", {"nullspace.without_domains": [domain]}))
    for size in (16, 64, 256, 1024, 4096):
        settings: dict[str, Any] = {"data.calibration_size": size}
        if config["data"]["general"] == "toy/general" and size > 1024:
            settings["data.general"] = [{"rows": "nspo_lightning.toy.world.many_general_rows", "kind": "benign"}]
            for part, split in (("val", "validation"), ("test", "test")):
                settings[f"data.general_{part}"] = {"path": "toy/general", "split": split}
        variants.append(("nspo", "samples", counted(size, "sample"), settings))
    variants += [
        ("nspo", "text", "prompt alone", {"data.calibration_text": "prompt"}),
        ("nspo", "text", "prompt + model's answer", {"data.calibration_text": "prompt_and_model_answer"}),
    ]
    return Sweep(
        title="What the null space is computed from",
        question="Which domains, how many samples and which text K needs (all: prompt + reference answer, all domains)",
        variants=variants,
    )


def _threshold() -> Sweep:
    variants: list[Variant] = [("grpo", "none", "no projection", {})]
    variants.append(("nspo", "auto", "auto", {"nullspace.criterion": "auto"}))
    for criterion, values in {
        "energy": (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4),
        "relative": (5e-3, 5e-4, 5e-5),
        "rank": (0.25, 0.5, 0.75, 0.9),
    }.items():
        for value in values:
            settings = {"nullspace.criterion": criterion, "nullspace.threshold": value}
            variants.append(("nspo", criterion, f"{criterion} {value:g}", settings))
    for value in (0.01, 0.1, 1.0):
        variants.append(("soft", "soft", f"soft {value:g}", {"nullspace.softness": value}))
    question = "Null share against safety and tax"
    return Sweep(title="How many directions are protected", question=question, variants=variants)


def _data(config: Mapping[str, Any]) -> Sweep:
    sources = as_dicts(config["data"]["safety"])
    variants: list[Variant] = []
    for method in ("nspo", "grpo"):
        for share in (0.1, 0.2, 0.4, 0.7, 1.0):
            chosen = [{**source, "fraction": share} for source in sources]
            label = f"{method.upper()}, {share:.0%} of the prompts"
            variants.append((method, method.upper(), label, {"data.safety": chosen}))
    question = "10 to 100 % of the safety prompts, the number of training steps being the same"
    return Sweep(title="How much safety data is needed", question=question, variants=variants)


def _rank() -> Sweep:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    variants: list[Variant] = []
    for rank in (2, 4, 8, 16, 32):
        settings = {"model.policy.lora.r": rank, "model.policy.lora.alpha": 2 * rank}
        variants.append(("nspo", "rank, all layers", f"rank {rank}, all layers", settings))
    for name, modules in (("attention", attention), ("MLP", mlp)):
        settings_: dict[str, Any] = {"model.policy.lora.target_modules": modules}
        variants.append(("nspo", "target modules", f"rank 8, {name}", settings_))
    question = "What the adapter's size and place do"
    return Sweep(title="LoRA rank and target modules", question=question, variants=variants)
