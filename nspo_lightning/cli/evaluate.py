"""`python -m nspo_lightning evaluate`: general benchmarks by lm-evaluation-harness, for the policy and for its base.

The harness is an extra (`pip install "nspo-lightning[lm-eval]"`). It runs on the very policy that is trained, quantised
as it is and with its adapter in place; the base is the same model with the adapter off.
"""

from __future__ import annotations

import contextlib
import hashlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich import get_console

from nspo_lightning.atomic import set_aside_other, write_json
from nspo_lightning.checkpoints import find_checkpoint
from nspo_lightning.cli.harness_tasks import find_data, find_tasks, harness_tasks
from nspo_lightning.cli.help import PROG
from nspo_lightning.cli.parser import PlainParser
from nspo_lightning.cli.run_config import policy_settings, read_config
from nspo_lightning.cli.run_folder import check_output, run_folder
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.module.checkpoint_content import load_trained_
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.nullspace.modes import adapters_off
from nspo_lightning.policy.adapter import has_adapter
from nspo_lightning.policy.identity import describe, policy_identity, versions
from nspo_lightning.policy.settings import PolicySettings

RESULT = "benchmarks.json"
_COLUMNS = ("task", "metric", "base", "policy", "change", "std. error", "of")
_DATA_SETTINGS = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split", "num_fewshot", "generation_kwargs")


def main(arguments: list[str]) -> None:
    """Run the `evaluate` command; errors are raised."""
    options = _parse(arguments)
    source = Path(options.config)
    config = read_config(source)
    name = config.get("name") if options.name is None else options.name
    run = run_folder(None if name is None else str(name), (config.get("trainer") or {}).get("default_root_dir"))
    _check_ranges(options)
    out = check_output("--out", run / RESULT if options.out is None else options.out)
    task_manager = _task_manager()  # before anything long
    trained = None if options.ckpt_path is None else find_checkpoint(options.ckpt_path, run)
    tasks, folders = find_tasks(options.tasks)
    data = find_data(options.data, tasks)
    if data and options.num_fewshot:
        raise MisconfigurationException("`--num_fewshot`: a file of `--data` has no examples to spare. Leave it out.")
    folders += [] if options.include_path is None else [options.include_path]
    manager = _find_manager(task_manager, tasks, folders)
    _check_tasks(tasks, manager.all_tasks)
    wanted = harness_tasks(tasks, data, manager)
    module = _load(policy_settings(config, source), trained)
    found = run_harness(
        module, wanted, manager, options, untrained=trained is None and module.policy_settings.adapter is None
    )
    last = found.get("policy") or found["base"]
    result = {
        "identity": {
            **policy_identity(module, None if trained is None else str(trained)),
            "tasks": {task: _task_identity(last, task) for task in last["results"]},
            "judge": "none: every task scores itself",
            "decoding": {"chat_template": not options.no_chat_template, "generation": "each task's own, see `tasks`"},
            "limit": options.limit,
            "seed": options.seed,
            "versions": versions(),
        },
        "results": {who: harness_scores(values) for who, values in found.items()},
    }
    console = get_console()
    if kept := set_aside_other(out, result["identity"]):
        console.print(f"An earlier result of something else stood in {out}; it is now in {kept}.")
    write_json(result, out)
    rows = _rows(result["results"], last.get("n-samples", {}))
    console.print(rich_table("General benchmarks: base and policy", _COLUMNS, rows, align="llrrrrr"))
    console.print(f"written to {out}")


def run_harness(
    module: GRPOModule, tasks: Sequence[Any], manager: Any, options: Namespace, *, untrained: bool
) -> dict[str, dict[str, Any]]:
    """Run the harness on the `base` (the adapter off) and the `policy`.

    Returns:
        Its results, by who was measured. An untrained policy is its base: one run. Trained weights without an adapter
        have no base here.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    policy = module.require_policy()
    policy.eval()
    model = HFLM(pretrained=policy, tokenizer=module.tokenizer, batch_size=options.batch_size)

    def one() -> dict[str, Any]:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=not options.no_chat_template,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
        return dict(results or {})

    found: dict[str, dict[str, Any]] = {}
    if untrained or has_adapter(policy):
        with adapters_off(policy) if has_adapter(policy) else contextlib.nullcontext():
            found["base"] = one()
    if not untrained:
        found["policy"] = one()
    return found


def harness_scores(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return task to metric (``name`` or ``name (filter)``, standard errors as ``name stderr``) to value."""
    table: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, (int, float)) or not filter_name:
                continue
            is_error = metric.endswith("_stderr")
            name = metric.removesuffix("_stderr") + ("" if filter_name == "none" else f" ({filter_name})")
            table.setdefault(task, {})[f"{name} stderr" if is_error else name] = float(value)
    return table


def _load(settings: PolicySettings, trained: Path | None) -> GRPOModule:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = GRPOModule(lambda prompts, completions, **_: [0.0] * len(completions), policy=settings)
    if trained is not None and trained.is_dir():
        module.adapter_folder = trained
    module.load(device)
    if settings.quantization == "none":
        module.to(device)
    if trained is not None and trained.is_file():
        load_trained_(module, trained)
    return module


def _task_identity(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Say which data and which settings a task was: its version, and a hash over its documents in their order."""
    config = results.get("configs", {}).get(task, {})
    samples = results.get("samples", {}).get(task, [])
    digest = hashlib.sha256("".join(str(sample.get("doc_hash")) for sample in samples).encode())
    return {
        "version": results.get("versions", {}).get(task),
        "documents": len({sample.get("doc_id") for sample in samples}),
        "sha256": digest.hexdigest()[:16] if samples else None,
        **{key: describe(config[key]) for key in _DATA_SETTINGS if config.get(key) is not None},
    }


def _rows(
    results: Mapping[str, Mapping[str, Mapping[str, float]]], samples: Mapping[str, Any]
) -> Iterator[tuple[str, ...]]:
    whole = {who: results.get(who, {}) for who in ("base", "policy")}
    for task, metrics in (whole["policy"] or whole["base"]).items():
        for metric in metrics:
            if metric.endswith(" stderr"):
                continue
            before, value = (of.get(task, {}).get(metric) for of in whole.values())
            error = metrics.get(f"{metric} stderr")
            yield (
                task,
                metric,
                "" if before is None else f"{before:.4f}",
                "" if value is None else f"{value:.4f}",
                "" if before is None or value is None else f"{value - before:+.4f}",
                "" if error is None else f"{error:.4f}",
                str(samples.get(task, {}).get("effective", "")),
            )


def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MisconfigurationException(
            f"`evaluate` runs lm-evaluation-harness, which is not installed ({error}). Install it: "
            '`pip install "nspo-lightning[lm-eval]"`.'
        ) from error
    return TaskManager


def _check_ranges(options: Namespace) -> None:
    for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise MisconfigurationException(f"`--{name}` must be at least {least}, got {value}.")


def _find_manager(task_manager: Any, tasks: Sequence[str], folders: Sequence[str]) -> Any:
    """Make the harness's task manager; without its own tasks, which take many seconds to read, if none is wanted."""
    if folders:
        own = task_manager(include_path=list(folders), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return task_manager(include_path=list(folders) or None)


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        raise MisconfigurationException(
            f"`--tasks`: the harness knows no {', '.join(unknown) or 'task of an empty name'}. Give names out of "
            "`lm_eval ls tasks`, separated by commas, or the folder of your own tasks as `--include_path`."
        )


def _parse(arguments: list[str]) -> Namespace:
    parser = PlainParser(prog=f"{PROG} evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("-c", "--config", required=True, help="the training config; its `model.policy` is loaded")
    parser.add_argument(
        "--tasks", required=True, help="names of the harness's tasks (gsm8k,mmlu), or a task's YAML file"
    )
    parser.add_argument(
        "--ckpt_path",
        help="`best` or `last` of the run, a checkpoint file, or an adapter's folder; without: the base alone",
    )
    parser.add_argument("--name", help="the run's name, if not that of the config")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt; default: the task's own")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at once (default: 8)")
    parser.add_argument("--include_path", help="folder with tasks of your own")
    parser.add_argument(
        "--data", metavar="TASK=FILE", action="append", default=[], help="rows of a task from a local file; may repeat"
    )
    parser.add_argument("--out", help=f"result file (default: runs/NAME/{RESULT})")
    parser.add_argument("--seed", type=int, default=0, help="of the harness's own choices (default: 0)")
    parser.add_argument("--no_chat_template", action="store_true", help="give the tasks' text as it is")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="let tasks that run the model's code do so"
    )
    return parser.parse_args(arguments)
