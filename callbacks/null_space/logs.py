"""What the null-space callback says and writes to loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from nspo_lightning.atomic import replacing, write_json
from nspo_lightning.callbacks.null_space.overview import DETAILS, overview_rows, promise_rows, remarks, write_details
from nspo_lightning.callbacks.null_space.verification import Verification
from nspo_lightning.compat.lightning import is_fast_dev_run
from nspo_lightning.evaluation.diagnosis import LEAKED, LEFT, NullSpaceFacts, RunFacts, diagnose, explain_certificate
from nspo_lightning.evaluation.tables import rich_table, table_text
from nspo_lightning.nullspace import Calibration, LayerCertificate
from nspo_lightning.nullspace.basis_set import mean_null_share
from nspo_lightning.nullspace.keeper import GradientEnergy
from nspo_lightning.nullspace.record import null_space_record
from nspo_lightning.terminal import counted

if TYPE_CHECKING:
    from rich.table import Table

RECORD = "null_space.json"
"""What is free where, and the certificate; written at the start of a fit, and again at its end."""
PICTURE = "null_space.png"


PROMISED = "Promised, by domain: the mean square change of outputs by a step of a given gain, 1 = without projection"


def step_metrics(energy: Sequence[GradientEnergy], certificates: Sequence[LayerCertificate]) -> dict[str, Tensor]:
    """Return the metrics of a step from gradient energies (one for each optimizer) and certificates."""
    before = torch.stack([e.before for e in energy]).sum()
    after = torch.stack([e.after for e in energy]).sum()
    values = {
        "nullspace/grad_norm_before": before.sqrt(),
        "nullspace/grad_norm_after": after.sqrt(),
        "nullspace/kept_gradient_energy": after / before.clamp_min(torch.finfo(before.dtype).tiny),
    }
    if certificates:
        values["nullspace/leak_max"] = torch.tensor(max(c.leak for c in certificates))
        values["nullspace/output_change_max"] = torch.tensor(max(c.output_change for c in certificates))
        values["nullspace/update_norm"] = torch.tensor(sum(c.update_norm**2 for c in certificates) ** 0.5)
    return values


def overview_table(calibration: Calibration) -> Table:
    """Return a table with a row for each kind of input, which fits in 80 columns."""
    rows = overview_rows(calibration)
    return rich_table("", list(rows[0]), [list(row.values()) for row in rows], align="lrrrr")


def promise_table(calibration: Calibration) -> Table | None:
    """Return a table of what is promised of each domain; None where the criterion promises nothing."""
    rows = promise_rows(calibration)
    if not rows:
        return None
    return rich_table("", list(rows[0]), [list(row.values()) for row in rows], align="lrrr")


def show_bases(calibration: Calibration, folder: Path | None) -> None:
    """Print the table of bases that were just made, and write each of them into a file of the run's folder."""
    lines = [table_text(overview_table(calibration)), *(f"- {remark}" for remark in remarks(calibration))]
    if (promises := promise_table(calibration)) is not None:
        lines += [f"{PROMISED}:", table_text(promises)]
    if folder is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        write_details(calibration, folder / f"nullspace{DETAILS}")
        lines.append(f"Each input: {folder / f'nullspace{DETAILS}'}")
    rank_zero_info("Null space of the layers' inputs:\n" + "\n".join(lines))


def show_verification(found: Verification) -> None:
    """Say what the check before training found, and what it could not look at."""
    if not found.calls:
        rank_zero_warn("Null space not checked: there is no calibration text at hand to look at outputs on.")
        return
    rank_zero_info(
        f"Null space checked: outputs on {counted(found.calls, 'calibration text')} change by {found.change:.1g} "
        f"(relative) when {counted(found.layers, 'layer is', 'layers are')} moved inside it."
    )
    if found.without_room:
        shown = ", ".join(found.without_room[:3]) + (" ..." if len(found.without_room) > 3 else "")
        rank_zero_warn(
            f"{counted(len(found.without_room), 'layer')} could not be checked: the inputs of a single text leave "
            f"them no direction to move in ({shown})."
        )


def show_certificate(facts: NullSpaceFacts, layers: int) -> None:
    """Print a fit's certificate, a sentence for each figure, and a warning where what should be held has leaked."""
    if facts.leak is None:
        return
    rank_zero_info("\n  ".join([f"Null-space certificate: {counted(layers, 'layer')}.", *explain_certificate(facts)]))
    if facts.held and facts.leak > LEAKED:
        rank_zero_warn(
            f"The update of {facts.leak_layer} left the null space (leak {facts.leak:.2g}): something else than an "
            "optimizer step has moved weights (another callback, code of the training step)."
        )


def warn_of_findings(facts: NullSpaceFacts | None, told: set[str]) -> None:
    """Warn of what a null space leaves to updates, each finding once; a certificate tells of leaks itself.

    Args:
        facts: None = nothing is held.
        told: Titles of what was warned of; grows.
    """
    for finding in diagnose(RunFacts(null_space=facts)):
        if finding.title not in (LEFT, *told):
            told.add(finding.title)
            rank_zero_warn(f"{finding.title}. {finding.text} {finding.cure}")


def write_record(
    trainer: pl.Trainer,
    calibration: Calibration,
    certificates: Sequence[LayerCertificate] = (),
    *,
    output_change: float | None = None,
    verification: Verification | None = None,
) -> None:
    """Write ``null_space.json`` into the logger's folder, if there is one.

    Args:
        trainer: Knows the folder.
        calibration: The bases, which say what is free.
        certificates: Of the fit, at its end.
        output_change: Measured on a little calibration text, at the end.
        verification: What was checked before the first step.
    """
    folder = run_folder(trainer)
    if not trainer.is_global_zero or folder is None or is_fast_dev_run(trainer):
        return
    checked = None if verification is None else {"change": verification.change, "layers": verification.layers}
    record = null_space_record(calibration, certificates)
    write_json({**record, "output_change": output_change, "checked": checked}, folder / RECORD)


def log_start(trainer: pl.Trainer, calibration: Calibration) -> None:
    """Log the dimensions once; show how much is free and where, as a figure in TensorBoard and beside the run."""
    bases = list(calibration.bases.values())
    values = {
        "nullspace/null_dims_mean": sum(b.null_dims for b in bases) / len(bases),
        "nullspace/null_dims_min": float(min(b.null_dims for b in bases)),
        "nullspace/null_share_mean": mean_null_share(calibration),
        "nullspace/energy_left_max": max(b.choice.energy_left for b in bases),
    }
    folder = run_folder(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
    if trainer.is_global_zero and trainer.loggers and not is_fast_dev_run(trainer):
        _show_free(trainer, calibration, folder)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder that a run's logger writes to (cross-rank synchronisation).

    None without a logger, and where several runs share the logger's folder, as wandb's do.
    """
    folder = trainer.log_dir
    return Path(folder) if folder and isinstance(trainer.logger, (TensorBoardLogger, CSVLogger)) else None


def _show_free(trainer: pl.Trainer, calibration: Calibration, folder: Path | None) -> None:
    try:
        from nspo_lightning.callbacks.null_space.free_figure import free_figure

        figure = free_figure(calibration)
    except ImportError:  # matplotlib is optional here: the picture is left out, the numbers are logged
        return
    if folder is not None:
        with replacing(folder / PICTURE) as partial:
            figure.savefig(partial, dpi=120, format="png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("nullspace/spectrum", figure, global_step=trainer.global_step, close=False)
