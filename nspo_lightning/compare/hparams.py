"""Results as TensorBoard's HParams: methods and settings against the test metrics."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from nspo_lightning.compare.distance import UPDATE_NORM
from nspo_lightning.compare.results import RunResult
from nspo_lightning.evaluation.rates import ACCURACY, GARBAGE, OVER_REFUSAL, REFUSAL, REFUSED, UNSAFE
from nspo_lightning.evaluation.text_means import SAFETY_KL, TEXT_NAMES

_METRICS = (
    UNSAFE,
    REFUSED,
    GARBAGE,
    ACCURACY,
    REFUSAL,
    OVER_REFUSAL,
    *TEXT_NAMES,
    SAFETY_KL,
    UPDATE_NORM,
)


def write_hparams(results: Sequence[RunResult], folder: Path) -> None:
    """Write one HParams session a run, with the validation curves beside it, replacing what stood in the folder."""
    from torch.utils.tensorboard import SummaryWriter

    if folder.exists():
        shutil.rmtree(folder)
    swept = any(result.spec.variant for result in results)
    for result in results:
        spec = result.spec
        with SummaryWriter(str(folder / spec.name)) as writer:
            for record in result.trajectory:
                for metric in _METRICS:
                    if metric in record:
                        writer.add_scalar(f"validation/{metric}", record[metric], int(record["rollouts"]))
            parameters: dict[str, str | float] = {"method": spec.method, "seed": str(spec.seed)}
            if swept:
                parameters["variant"] = spec.variant or spec.label
            parameters |= {"learning_rate": spec.learning_rate or 0.0, "null_share": result.null_share or 0.0}
            metrics = {f"test/{m}": result.test[m] for m in _METRICS if m in result.test}
            writer.add_hparams(parameters, metrics, run_name=".")
