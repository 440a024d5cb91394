"""A model that was trained in the null space of its bases: they are still its own, and a file of them says so."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import lightning.pytorch as pl

from nspo_lightning.callbacks.null_space.hold import Hold
from nspo_lightning.evaluation.diagnosis import LEAKED
from nspo_lightning.nullspace import Calibration
from nspo_lightning.nullspace.fingerprint import model_fingerprint
from nspo_lightning.nullspace.store import model_differences

_BECAME = ("weights", "buffers")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fit that was begun, kept to see later what the model has become.

    Attributes:
        module: The module that was fitted.
        precision: The Trainer's.
        hold: What was held, and where it was at the start.
    """

    module: weakref.ref[pl.LightningModule]
    precision: str
    hold: Hold

    def grown(self, calibration: Calibration) -> Calibration:
        """Return a calibration that belongs to the model as it is now, too.

        That is so if the model now is the one that the bases were made for plus an update that was held; else the
        calibration is returned unchanged. Adapters change no weight that a fingerprint holds, so nothing is added then.
        """
        module = self.module()
        if module is None or not self.hold.holds_weights:
            return calibration
        names = calibration.layer_names().union(calibration.unreached)
        with self.hold.at_start():
            began = model_fingerprint(module, names, self.precision)
        del began["buffers"]  # what training changed of them has no effect, or it was refused
        if model_differences(calibration, began) or any(c.leak > LEAKED for c in self.hold.certificates()):
            return calibration
        now = model_fingerprint(module, names, self.precision)
        if not model_differences(calibration, now):
            return calibration
        return replace(calibration, grown=(*calibration.grown, {key: now[key] for key in _BECAME}))
