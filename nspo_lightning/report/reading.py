"""Read a run from its folder: every file may be missing, half written, or of an earlier version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from nspo_lightning.callbacks.diagnosis import DIAGNOSIS
from nspo_lightning.callbacks.null_space.logs import RECORD as NULL_SPACE
from nspo_lightning.callbacks.run_report import SUMMARY
from nspo_lightning.callbacks.test_report import RESULT as TEST
from nspo_lightning.checkpoints import FOLDER, last_in
from nspo_lightning.evaluation.diagnosis import SEVERITIES, RunFacts, diagnose
from nspo_lightning.keys import mask_keys
from nspo_lightning.policy.settings import TOY
from nspo_lightning.report.curves import last_step, read_curves
from nspo_lightning.report.exchanges import read_exchanges
from nspo_lightning.report.measurements import of_fit, of_test
from nspo_lightning.report.records import Finding, LayerInput, Measurement, NullSpace, Run
from nspo_lightning.report.settings import non_default_settings

CONFIG = "config.yaml"
"""What a run was trained with."""
_HPARAMS = {
    "lr": "model.optimizer.init_args.lr",
    "seed": "seed_everything",
    "criterion": "nullspace.criterion",
    "threshold": "nullspace.threshold",
    "rank": "model.policy.lora.r",
    "group size": "model.group_size",
    "batch size": "data.batch_size",
    "accumulate": "trainer.accumulate_grad_batches",
    "loss": "model.objective.loss_type",
    "beta": "model.objective.beta",
    "temperature": "model.sampling.temperature",
    "base": "model.policy.path",
    "quantization": "model.policy.quantization",
}
"""What runs are most often compared by, under short names: TensorBoard's columns are narrow."""
_SUBSPACES = {
    "random": "a random subspace",
    "protected": "the directions that general text uses",
    "weights": "directions taken from the weights",
    "to_learn": "the directions of the prompts that are trained on",
}


class NoRunError(ValueError):
    """A folder that is no run's."""


def find_run(name: str, runs: Path) -> Path:
    """Return the folder that a name of a run, or a path, means.

    Raises:
        NoRunError: If there is none, or nothing of a run in it.
    """
    places = [Path(name), runs / name]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        known = sorted(place.name for place in runs.glob("*") if is_run(place)) if runs.is_dir() else []
        near = get_close_matches(name, known, n=1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        there = f"There are: {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}." if known else "It holds none."
        raise NoRunError(
            f"`report {name}`: expected the name of a run in {runs}/, or its folder, and found neither.{meant} {there} "
            "`fit` makes one."
        )
    if not is_run(folder):
        raise NoRunError(
            f"`report {name}`: {folder} is a folder, but not a run's: it has none of {CONFIG}, {SUMMARY}, {TEST} and "
            "no TensorBoard events. Give the folder that `fit` or `test` said it had written to."
        )
    return folder


def is_run(folder: Path) -> bool:
    """Whether a folder holds something that a run leaves."""
    named = any((folder / name).is_file() for name in (CONFIG, SUMMARY, TEST))
    return named or any(folder.glob("events.out.tfevents.*"))


def read_run(folder: Path) -> Run:
    """Return what a run's folder says of it."""
    config = _yaml(folder / CONFIG) or _yaml(folder / "config.test.yaml")
    summary, test = _json(folder / SUMMARY), _json(folder / TEST)
    curves = read_curves(folder)
    warm_start = any(name.startswith("warmup/") for name in curves)
    method = method_of(config, warm_start=warm_start)
    measurements = [of_test(test)] if isinstance(test, Mapping) else []
    measurements += [of_fit(summary)] if isinstance(summary, Mapping) else []
    said = summary if isinstance(summary, Mapping) else {}
    model, policy = _section(config, "model"), _section(_section(config, "model"), "policy")
    base, adapter = str(policy.get("path") or ("" if not policy else TOY)), folder / "adapter"
    skills = model.get("over_refusal_skills")
    look_alikes = tuple(map(str, skills)) if isinstance(skills, Sequence) else ("over_refusal",)
    null_space = _null_space(_json(folder / NULL_SPACE))
    return Run(
        name=folder.resolve().name,
        folder=folder,
        finished=bool(said),
        base=base,
        variety=_variety(policy),
        facts=_facts(config, null_space, method),
        settings=non_default_settings(config, warm_start=warm_start),
        measurements=tuple(measurements),
        curves=curves,
        answers=read_exchanges(folder, look_alikes, tested=isinstance(test, Mapping)),
        null_space=null_space,
        findings=_findings(_json(folder / DIAGNOSIS), next((one for one in measurements if one.job == "test"), None)),
        steps=_steps(said),
        updates=_whole(said.get("updates")),
        skipped=_whole(said.get("updates_skipped")) or 0,
        seconds=said.get("seconds") if isinstance(said.get("seconds"), (int, float)) else None,
        leak=said.get("nullspace/leak_max") if isinstance(said.get("nullspace/leak_max"), float) else None,
        adapter=adapter if adapter.is_dir() else None,
        last_step=last_step(curves),
        warm_start=warm_start,
        resumable=last_in(folder / FOLDER) is not None,
        method=method,
        hparams=_hparams(config, method),
    )


def _hparams(config: Mapping[str, Any], method: str) -> dict[str, str | float]:
    """Return the settings of `_HPARAMS` that the configuration has."""
    found: dict[str, str | float] = {"method": method} if method else {}
    for name, place in _HPARAMS.items():
        value: Any = config
        for part in place.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, (bool, str)):
            found[name] = str(value)
        elif isinstance(value, (int, float)):
            found[name] = float(value)
    return found


def method_of(config: Mapping[str, Any], *, warm_start: bool = False) -> str:
    """Return what trained the policy, in a few words; "" where nothing says so."""
    if not config:
        return ""
    what = "a warm start" if warm_start else "GRPO"
    nullspace, beta = _section(config, "nullspace"), _section(_section(config, "model"), "objective").get("beta")
    kl = f", KL weight {beta:g}" if isinstance(beta, (int, float)) and beta else ""
    if nullspace.get("enabled") is False:
        return f"{what} without projection{kl}"
    subspace = nullspace.get("subspace")
    kept = _SUBSPACES.get(str(subspace), "the null space of general text")
    soft = " (soft)" if nullspace.get("form") == "soft" else ""
    return f"{what} in {kept}{soft}{kl}"


def _facts(config: Mapping[str, Any], null_space: NullSpace | None, method: str) -> dict[str, str]:
    if not config:
        return {}
    model, data = _section(config, "model"), _section(config, "data")
    policy = _section(model, "policy")
    lora = policy.get("lora")
    trained = f"LoRA of rank {lora.get('r')}" if isinstance(lora, Mapping) else "all weights"
    facts = {
        "Method": method,
        "Model": f"{policy.get('path', TOY)} ({_variety(policy) or '?'}); trained: {trained}",
        "Prompts to train on": _sources(data.get("safety")),
        "General text": _sources(data.get("general")),
        "Reward": _classes(model.get("reward")),
    }
    if isinstance(judge := model.get("judge"), Mapping):
        facts["Judge"] = _classes(judge)
    if null_space is not None and null_space.tokens:
        tokens = ", ".join(f"{name} {count:,}" for name, count in null_space.tokens.items())
        facts["Protected by"] = f"criterion {null_space.criterion}, {null_space.form} form; tokens: {tokens}"
    if (seed := config.get("seed_everything")) is not None:
        facts["Seed"] = str(seed)
    return {title: mask_keys(text) for title, text in facts.items() if text}


def _variety(policy: Mapping[str, Any]) -> str:
    """Return what else than its path says which model a policy begins from; "" where nothing is known."""
    if not policy:
        return ""
    merged = policy.get("adapter") if policy.get("merge_adapter") else None
    others = {"file": policy.get("gguf_file"), "revision": policy.get("revision"), "merged with": merged}
    quantization = str(policy.get("quantization", "?")).replace("none", "unquantised")
    precision = f"{quantization} base in {policy.get('dtype', '?')}"
    return ", ".join([precision, *(f"{name} {value}" for name, value in others.items() if value)])


def _steps(summary: Mapping[str, Any]) -> int | None:
    """Return the step that a summary is of: updates that stand, were skipped, or were taken back."""
    counts = [_whole(summary.get(name, 0)) for name in ("updates", "updates_skipped", "updates_undone")]
    return None if "updates" not in summary or None in counts else sum(count or 0 for count in counts)


def _sources(value: Any) -> str:
    """Return what the data sources of a section are called."""
    if isinstance(value, list):
        return "; ".join(_sources(entry) for entry in value)
    if isinstance(value, Mapping):
        if isinstance(value.get("sources"), (list, Mapping)):
            return _sources(value["sources"])
        arguments = _section(value, "init_args") or value
        named = next((arguments[key] for key in ("preset", "path", "source") if arguments.get(key)), None)
        share = arguments.get("fraction")
        part = f" ({100 * share:g} % of it)" if isinstance(share, (int, float)) and share != 1 else ""
        return f"{named}{part}" if isinstance(named, str) else _sources(named) if named else str(dict(value))[:200]
    return "" if value is None else str(value)


def _classes(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(filter(None, map(_classes, value)))
    if isinstance(value, Mapping):
        arguments = value.get("init_args")
        path = arguments.get("path") or arguments.get("model") if isinstance(arguments, Mapping) else None
        name = str(value.get("class_path", "")).rpartition(".")[2]
        return f"{name} ({path})" if path else name
    return "" if value is None else str(value)


def _null_space(record: Any) -> NullSpace | None:
    if not isinstance(record, Mapping) or not isinstance(record.get("inputs"), list):
        return None
    settings = _section(record, "settings")
    names = LayerInput.__dataclass_fields__
    inputs = []
    for entry in record["inputs"]:
        if isinstance(entry, Mapping) and all(name in entry for name in names):
            values = {name: entry[name] for name in names}
            inputs.append(LayerInput(**{**values, "layers": tuple(map(str, entry["layers"]))}))
    checked = _section(record, "checked")
    return NullSpace(
        criterion=str(settings.get("criterion", "?")),
        form=str(settings.get("form", "?")),
        inputs=tuple(inputs),
        tokens={str(name): int(count) for name, count in _section(record, "tokens").items()},
        output_change=record.get("output_change"),
        checked_change=checked.get("change"),
        checked_layers=int(checked.get("layers", 0)),
    )


def _findings(record: Any, test: Measurement | None) -> tuple[Finding, ...]:
    """Return what a run's diagnosis found, and what the figures of `test`, which is later, say of the same."""
    rows = record.get("findings") if isinstance(record, Mapping) else record
    later = [] if test is None else [finding.as_dict() for finding in diagnose(_facts_of_figures(test))]
    titles = {row["title"] for row in later}
    earlier = [row for row in (rows if isinstance(rows, list) else []) if isinstance(row, Mapping)]
    found = [
        Finding(**{name: str(row.get(name) or "") for name in ("severity", "title", "text", "cure")})
        for row in (*later, *(row for row in earlier if row.get("title") not in titles))
    ]
    rank = {str(name): place for place, name in enumerate(SEVERITIES)}
    return tuple(sorted(found, key=lambda finding: rank.get(finding.severity.lower(), len(rank))))


def _facts_of_figures(measurement: Measurement) -> RunFacts:
    """Return the figures of a measurement and of its parts, as a diagnosis takes them."""
    parts = [part for breakdown in measurement.breakdowns for part in breakdown.parts]
    figures = [measure for measure in (*measurement.measures, *parts) if measure.after is not None]
    return RunFacts(
        before={m.name: m.before.value for m in figures if m.before is not None},
        after={m.name: m.after.value for m in figures if m.after is not None},
        intervals={m.name: m.after.interval for m in figures if m.after is not None and m.after.interval is not None},
    )


def _section(values: Any, name: str) -> Mapping[str, Any]:
    inner = values.get(name) if isinstance(values, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _yaml(file: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}
