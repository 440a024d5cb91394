"""What the null-space callback writes to loggers, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from nspo_lightning.nullspace import Calibration, LayerCertificate
from nspo_lightning.nullspace.keeper import GradientEnergy


def logs_now(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer writes metrics at this step (the same rule as its logger connector)."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(trainer.loggers) and every > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


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


def log_start(trainer: pl.Trainer, calibration: Calibration) -> None:
    """Log the dimensions once, and the spectrum as a figure where the logger takes figures (TensorBoard)."""
    bases = list(calibration.bases.values())
    shares = [b.null_dims / b.width for b in bases]
    values = {
        "nullspace/null_dims_mean": sum(b.null_dims for b in bases) / len(bases),
        "nullspace/null_dims_min": float(min(b.null_dims for b in bases)),
        "nullspace/null_share_mean": sum(shares) / len(shares),
        "nullspace/energy_left_max": max(b.choice.energy_left for b in bases),
    }
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
        add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
        if add_figure is None or not trainer.is_global_zero:
            continue
        figure = _figure(calibration)
        if figure is not None:
            add_figure("nullspace/spectrum", figure, global_step=trainer.global_step, close=False)


def _figure(calibration: Calibration) -> Any:
    try:
        from nspo_lightning.nullspace.picture import spectrum_figure

        return spectrum_figure(calibration)
    except ImportError:  # matplotlib is optional here: the picture is left out, the numbers are logged
        return None
