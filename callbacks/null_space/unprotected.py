"""What cannot be held in the null space is refused, warned about or frozen: parameters, dtypes, strategies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from nspo_lightning.nullspace import Calibration, LayerPlan, UnheldLayersError
from nspo_lightning.terminal import counted

Unprotected = Literal["error", "warn", "freeze"]
_SHOWN = 12  # parameters that a message names


def report_unprotected(
    plan: LayerPlan, mode: Unprotected, target_modules: str | Sequence[str] | None
) -> list[nn.Parameter]:
    """Return refused parameters that are to be frozen; the arguments are a plan and the callback's settings.

    Raises:
        MisconfigurationException: In mode ``error``, or if there is nothing to hold.
    """
    if plan.refusals:
        lines = "\n  ".join(str(refusal) for refusal in plan.refusals[:_SHOWN])
        more = f"\n  ... and {len(plan.refusals) - _SHOWN} more" if len(plan.refusals) > _SHOWN else ""
        text = f"{counted(len(plan.refusals), 'trained parameter')} cannot be held in the null space:\n  {lines}{more}"
        if mode == "error":
            raise MisconfigurationException(
                f"{text}\nOr set `unprotected='freeze'` (they do not train) or 'warn' (they train freely)."
            )
        if mode == "warn":
            rank_zero_warn(f"{text}\nThey train freely and may move general outputs.")
    if not plan.layers:
        raise MisconfigurationException(
            "NullSpaceProjection found no trained LoRA adapter or linear layer that it can hold"
            + (f" among target_modules={target_modules!r}" if target_modules is not None else "")
            + ". Check that the module's trainable parameters have `requires_grad=True` before fit."
        )
    return [refusal.parameter for refusal in plan.refusals] if mode == "freeze" else []


def without_unreached(
    plan: LayerPlan, calibration: Calibration, mode: Unprotected
) -> tuple[LayerPlan, list[nn.Parameter]]:
    """Return a plan without layers that no text reached, and their parameters if they are to be frozen; it is said.

    Raises:
        UnheldLayersError: In mode ``error``.
        MisconfigurationException: If nothing is left to hold.
    """
    gone = [layer for layer in plan.layers if layer.name in calibration.unreached]
    if not gone:
        return plan, []
    if mode == "error":
        raise UnheldLayersError([layer.name for layer in gone], len(plan.layers))
    rest = LayerPlan(layers=tuple(layer for layer in plan.layers if layer not in gone), refusals=())
    shown = ", ".join(layer.name for layer in gone[:_SHOWN]) + (" ..." if len(gone) > _SHOWN else "")
    fate = "frozen" if mode == "freeze" else "left to train freely, which may move general outputs"
    rank_zero_warn(
        f"{counted(len(gone), 'layer has', 'layers have')} no basis (no calibration text gets there), {fate}: {shown}"
    )
    report_unprotected(rest, mode, None)
    parameters = [p for layer in gone for p in (layer.matrix, layer.output) if p is not None and p.requires_grad]
    return rest, parameters if mode == "freeze" else []


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies whose weights or gradients cannot be reached.

    Raises:
        MisconfigurationException: Under FSDP1 and DeepSpeed.
    """
    for strategy, why in (
        (FSDPStrategy, "FSDP1 keeps weights and gradients as slices of a flat buffer"),
        (DeepSpeedStrategy, "DeepSpeed's engine owns the gradients and the master weights"),
    ):
        if isinstance(trainer.strategy, strategy):
            raise MisconfigurationException(
                f"NullSpaceProjection cannot run under {type(trainer.strategy).__name__}: {why}, so a projection "
                "here would have no effect on the real weights. Use ModelParallelStrategy (FSDP2: shards whole "
                "rows, which is projected exactly) or 'ddp'."
            )


def require_float32(plan: LayerPlan) -> None:
    """Refuse trained matrices in half precision.

    Raises:
        MisconfigurationException: Naming the first one.
    """
    low = [layer for layer in plan.layers if layer.matrix.dtype not in (torch.float32, torch.float64)]
    if low:
        raise MisconfigurationException(
            f"{counted(len(low), 'trained matrix is', 'trained matrices are')} in {low[0].matrix.dtype} (first: "
            f"{low[0].name}); rounding to it alone leaks about 4e-3 of an update into what is protected. Keep "
            "trained weights in float32: precision='bf16-mixed' or '32-true' instead of 'bf16-true' or '16-true' "
            "(peft: `autocast_adapter_dtype=True`)."
        )
