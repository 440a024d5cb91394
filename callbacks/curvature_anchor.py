"""A pull back to the base by the curvature of general text: the penalty of `GeneralKL`, measured once."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.protocols import BoundsMicrobatches
from nspo_lightning.callbacks.pull_text import (
    check_coefficient,
    check_pull,
    check_start_weight,
    text_to_pull_by,
    together,
)
from nspo_lightning.callbacks.stopping import stop_if_told
from nspo_lightning.callbacks.text_gradients import add_pull_, check_takes_text, microbatches, trained_by
from nspo_lightning.compat.host import free_memory
from nspo_lightning.compat.torch import memory_of
from nspo_lightning.nullspace.curvature import Curvature, check_layers, measure_curvature, needed_bytes
from nspo_lightning.nullspace.layers import ProtectedLayer, plan_layers
from nspo_lightning.terminal import counted, duration, rows_progress

_TOO_FAR = 10.0
"""Times what was foretold that general text may have moved, before it is said."""
_WORTH_A_WORD = 1e-3
"""Nats a token; less than that is no loss of ability."""


class CurvatureAnchor(Callback):
    """Add `coefficient` times the second-order KL(base || policy) on general text to the loss of every update.

    Before training, the text that a null space would be computed from is read once, forward and backward, with the
    adapter off; what each layer's update would do to the model's own predictions there is kept as two matrices a layer
    (see `nspo_lightning.nullspace.curvature`). From then on no text is read: an update costs a few products as
    thin as the adapter, and all of the text counts in each of them, where `GeneralKL` takes some rows in turn.

    Beside `NullSpaceProjection` it charges for the general energy that is left in the free directions; list it before
    that callback, so that its gradient is projected too. The gradient is added before clipping. Updates that are
    skipped for want of a signal pull nowhere either. Logs `curvature_anchor/kl`, the second-order KL in nats a token,
    of the adapters that are trained. A run that goes on measures again, the same; a warm start is pulled as well. At
    the end what is foretold is held against the KL itself on a batch of the text; a warning says where it is far off.

    With `start_weight` the starts of the base's own answers to further general prompts (the datamodule's
    `calibration_starts`), where it is decided whether a prompt is refused, have that share of the mean.

    Args:
        coefficient: Of the KL, in units of the loss for a nat a token.
        start_weight: Share of the starts of answers in the mean, from 0 to 1.
        rows: Calibration rows that are read at most, rounded up to whole batches; None = all.
        width_limit: Sides of layers with more features are kept in so many directions, and the energy that is left is
            spread evenly over the others. A layer takes 4 bytes times the sum, over its two sides, of width times the
            smaller of width and this; twice that with a `start_weight` between 0 and 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, coefficient: float = 100.0, start_weight: float = 0.0, rows: int | None = None, width_limit: int = 1024
    ) -> None:
        check_coefficient(coefficient)
        check_start_weight(start_weight)
        if (rows is not None and rows < 1) or width_limit < 1:
            raise ValueError(f"`rows` and `width_limit` must be at least 1, got {rows} and {width_limit}.")
        self.coefficient = coefficient
        self.start_weight = start_weight
        self.rows = rows
        self.width_limit = width_limit
        self.kl: torch.Tensor | None = None
        """At the last update, nats a token; None before the first."""
        self._terms: list[tuple[float, Curvature]] = []
        self._sample: dict[str, Any] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything is measured, what has no base, no text, or other layers than an adapter's."""
        check_pull(trainer, pl_module, "CurvatureAnchor", self.start_weight)
        needed = needed_bytes(self._layers(pl_module), self.width_limit) * (2 if 0 < self.start_weight < 1 else 1)
        memory = memory_of(pl_module.device)
        free = free_memory() if memory is None else memory[0]
        if ranks.any_rank(needed > free):
            raise MisconfigurationException(
                f"CurvatureAnchor's moments take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Give it a "
                f"smaller `width_limit` (now {self.width_limit}), a `start_weight` of 0 or 1, or train fewer layers "
                "(`target_modules`)."
            )

    @staticmethod
    def _layers(module: pl.LightningModule) -> list[ProtectedLayer]:
        plan = plan_layers(module, resumed=True)
        if plan.refusals:
            raise MisconfigurationException(f"CurvatureAnchor can't hold {plan.refusals[0]}")
        try:
            return check_layers(plan.layers)
        except ValueError as problem:
            raise MisconfigurationException(f"CurvatureAnchor: {problem}") from None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        text, starts = text_to_pull_by(trainer, pl_module, "CurvatureAnchor", self.start_weight)
        if self.rows is not None:
            text = text[: -(-self.rows // len(text[0]["input_ids"]))]
        began = time.monotonic()
        self._terms, self._sample, self.kl = [], {}, None
        for share, batches, what in (
            (1 - self.start_weight, text, "general text"),
            (self.start_weight, together(starts), "starts of answers"),
        ):
            if share:
                self._terms.append((share, self._measure(trainer, pl_module, batches, what)))
        tokens = sum(curvature.tokens for _, curvature in self._terms)
        rank_zero_info(
            f"Curvature of the base on {counted(tokens, 'token')} of general text, "
            f"{counted(len(self._terms[0][1].layers), 'layer')}: {self.held_bytes() / 1e6:.0f} MB, "
            f"{duration(time.monotonic() - began)}."
        )

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, batches: list[Any], what: str) -> Curvature:
        source = check_takes_text(module, "CurvatureAnchor")
        limit = source.tokens_per_microbatch if isinstance(source, BoundsMicrobatches) else None
        parts = [part for batch in batches for part in microbatches(batch, limit)]
        self._sample = self._sample or parts[0]
        visible = trainer.is_global_zero
        with rows_progress(f"Curvature of {what}", len(parts), unit="batch", visible=visible) as advance:

            def after_batch() -> None:
                advance()
                stop_if_told(trainer)

            return measure_curvature(
                module,
                self._layers(module),
                (move_data_to_device(part, module.device) for part in parts),
                lambda batch: source.text_loss(batch, "drawn"),
                width_limit=self.width_limit,
                after_batch=after_batch,
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer | LightningOptimizer
    ) -> None:
        moved = {id(parameter) for parameter in trained_by(optimizer)}
        total = torch.zeros((), device=pl_module.device)
        for share, curvature in self._terms:
            kl, gradients = curvature.pull()
            total += share * kl.to(total.device)
            for parameter, gradient in gradients.items():
                if id(parameter) in moved:
                    add_pull_(parameter, gradient, self.coefficient * share)
        self.kl = total
        pl_module.log("curvature_anchor/kl", total, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold what the first kind of text was foretold against its KL, on a batch of it; all ranks do the same."""
        if self.kl is None:  # no update was taken
            return
        with torch.no_grad():
            sample = move_data_to_device(self._sample, pl_module.device)
            loss, tokens = check_takes_text(pl_module, "CurvatureAnchor").text_loss(sample, "kl")
        measured, foretold = float(loss) / max(tokens, 1), float(self._terms[0][1].pull()[0])
        if measured > max(_TOO_FAR * foretold, _WORTH_A_WORD):
            rank_zero_warn(
                f"CurvatureAnchor foretold a KL to the base of {foretold:.2g} nats a token on its text, and it is "
                f"{measured:.2g}: updates went beyond what the second order sees, or the base is certain of that text, "
                "which has no curvature then. Lower the learning rate, raise `coefficient`, or use `GeneralKL`, which "
                "measures in each update."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._terms, self._sample = [], {}  # gigabytes, of a large model

    def held_bytes(self) -> int:
        """Return the bytes of the moments."""
        return sum(curvature.held_bytes() for _, curvature in self._terms)
