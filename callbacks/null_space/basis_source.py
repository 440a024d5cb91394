"""Where the bases come from: a basis file, the cache, or text to calibrate on."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import BatchToInputs, tensors_of, to_call
from nspo_lightning.callbacks.protocols import AnswersPrompts, HasCalibrationText
from nspo_lightning.compat.lightning import datamodule_of, is_fast_dev_run
from nspo_lightning.nullspace import BasisSettings, Calibration, ForwardCall, load_calibration, save_calibration
from nspo_lightning.nullspace.fingerprint import combined, data_fingerprint, model_fingerprint
from nspo_lightning.nullspace.store import check_fingerprint

Source = str | PathLike[str] | Iterable[Any] | None


def calibration_batches(owner: Any, pl_module: pl.LightningModule) -> Iterable[Any]:
    """Return the batches of a `HasCalibrationText`, with the model's answers where it takes ``answer_fn``."""
    loader = owner.calibration_dataloader
    answered = "answer_fn" in inspect.signature(loader).parameters and isinstance(pl_module, AnswersPrompts)
    batches: Iterable[Any] = loader(answer_fn=pl_module.calibration_answers) if answered else loader()
    return batches


def is_sharded(batches: Iterable[Any]) -> bool:
    """Return whether a distributed sampler gives each rank batches of its own."""
    # Batches that are the same on all ranks are dealt out to them; dealing twice would lose the others.
    return isinstance(batches, DataLoader) and isinstance(batches.sampler, DistributedSampler)


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """Layers to calibrate, and the text to do it on."""

    modules: Mapping[str, nn.Module]
    calls: Sequence[ForwardCall]
    """The text, on the CPU: several passes may be needed."""
    sharded: bool
    """Each rank has batches of its own."""
    fingerprint: dict[str, Any]
    """Of model, text and settings, the same on all ranks."""


@dataclass(kw_only=True)
class BasisSource:
    """Finds bases for a set of layers, or the text to make them from; the same on every rank."""

    source: Source
    """A basis file, calibration batches, or None for the datamodule's."""
    settings: BasisSettings
    batch_to_inputs: BatchToInputs | None = None
    limit_batches: int | None = None
    memory_budget_gb: float | None = None
    keep_moments: bool = False
    cache_dir: str | PathLike[str] | None = "auto"
    path: str | None = field(default=None, init=False)
    """The file that holds the bases, once they are in one."""
    _first: ForwardCall | None = field(default=None, init=False, repr=False)

    def find(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        modules: Mapping[str, nn.Module],
        resumed: Mapping[str, Any],
    ) -> Calibration | CalibrationJob:
        """Return the bases from a file or the cache, or what is to be done where there are none yet.

        Args:
            trainer: For its datamodule and root folder.
            pl_module: May give the text.
            modules: Layer name -> module.
            resumed: The callback's state in the checkpoint, empty at a fresh start.
        """
        if isinstance(self.source, (str, PathLike)):
            return self.load(Path(self.source), modules, resumed=bool(resumed))
        remembered = resumed.get("path")
        if remembered and all(ranks.gather_objects(Path(remembered).is_file())):
            return self.load(Path(remembered), modules, resumed=True)
        batches = self.batches(trainer, pl_module)
        job = self.job(modules, batches, sharded=is_sharded(batches))
        self._first = next(iter(job.calls), None)
        cached = self._cache_path(trainer, job)
        if cached is not None and all(ranks.gather_objects(cached.is_file())):
            rank_zero_info(f"Null space: using the cached basis {cached}")
            return self.load(cached, modules, resumed=bool(resumed))
        return job

    def load(self, path: Path, modules: Mapping[str, nn.Module], *, resumed: bool) -> Calibration:
        """Return the calibration in a basis file.

        Args:
            path: The file.
            modules: Layer name -> module.
            resumed: Weights may have been trained since, so only names and shapes of the model are compared.

        Raises:
            MisconfigurationException: If layers are missing from it.
            ValueError: If it was made for something else.
        """
        calibration = load_calibration(path)
        model: Mapping[str, str] = model_fingerprint(modules)
        missing = set(modules) - calibration.layer_names()
        if missing:
            raise MisconfigurationException(
                f"The basis file {path} has no basis for {len(missing)} trained layers: {sorted(missing)[:5]}. "
                "Calibrate with the same `target_modules`."
            )
        if resumed or set(modules) != calibration.layer_names():
            model = {"structure": model["structure"]} if set(modules) == calibration.layer_names() else {}
        check_fingerprint(calibration.fingerprint, {"settings": self.settings.as_dict(), "model": model}, str(path))
        self.path = str(path)
        return calibration

    def keep(self, trainer: pl.Trainer, job: CalibrationJob, calibration: Calibration) -> None:
        """Write bases that were just made into the cache."""
        cached = self._cache_path(trainer, job)
        if cached is not None:
            if trainer.is_global_zero:
                save_calibration(calibration, cached)
            self.path = str(cached)

    def batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Any]:
        """Return the calibration batches.

        Raises:
            MisconfigurationException: If nobody provides any.
        """
        if self.source is not None and not isinstance(self.source, (str, PathLike)):
            return self.source
        for owner in (datamodule_of(trainer), pl_module):
            if isinstance(owner, HasCalibrationText):
                return calibration_batches(owner, pl_module)
        raise MisconfigurationException(
            "NullSpaceProjection has nothing to calibrate on: `calibration` is None and neither the datamodule nor the "
            "module has a `calibration_dataloader()`. Pass an iterable of batches, a basis file, or add that method."
        )

    def calls(self, batches: Iterable[Any]) -> list[ForwardCall]:
        """Return the batches as forward calls on the CPU."""
        return [to_call(batch, self.batch_to_inputs) for batch in itertools.islice(iter(batches), self.limit_batches)]

    def job(self, modules: Mapping[str, nn.Module], batches: Iterable[Any], *, sharded: bool) -> CalibrationJob:
        """Return what is to be done, with the text read."""
        calls = self.calls(batches)
        digests = ranks.gather_objects(data_fingerprint(tensor for call in calls for tensor in tensors_of(call)))
        same = len(set(digests)) == 1
        fingerprint = {
            "model": model_fingerprint(modules),
            "data": digests[0] if same else combined({str(rank): digest for rank, digest in enumerate(digests)}),
            "settings": self.settings.as_dict(),
        }
        return CalibrationJob(modules=modules, calls=calls, sharded=sharded, fingerprint=fingerprint)

    def first_call(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ForwardCall | None:
        """Return one batch to check outputs on, None where only a basis file is given.

        It is the first of those that were calibrated on, where that has just happened: text is read once.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            batches = self.batches(trainer, pl_module)
        except MisconfigurationException:
            return None
        return next(iter(self.calls(itertools.islice(iter(batches), 1))), None)

    def _cache_path(self, trainer: pl.Trainer, job: CalibrationJob) -> Path | None:
        if self.cache_dir is None or is_fast_dev_run(trainer):
            return None
        root = Path(trainer.default_root_dir) / "nullspace" if self.cache_dir == "auto" else Path(self.cache_dir)
        return Path(ranks.broadcast_object(str(root / f"{combined(job.fingerprint)}.safetensors"), 0))
