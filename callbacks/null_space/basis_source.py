"""Where the bases come from: a basis file, the cache, or calibration now."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import BatchToInputs, move_call, tensors_of, to_call
from nspo_lightning.callbacks.null_space.inference import inference
from nspo_lightning.nullspace import (
    BasisSettings,
    Calibration,
    ForwardCall,
    calibrate_modules,
    format_table,
    load_calibration,
    save_calibration,
    table_rows,
)
from nspo_lightning.nullspace.fingerprint import combined, data_fingerprint, model_fingerprint
from nspo_lightning.nullspace.store import check_fingerprint

Source = str | PathLike[str] | Iterable[Any] | None


def calibration_batches(owner: Any, pl_module: pl.LightningModule) -> Iterable[Any]:
    """Return the owner's calibration batches.

    Where the dataloader can use the model's own answers (it takes ``answer_fn``) and the module gives some (it has
    ``calibration_answers``, from a list of prompts to a list of texts), the two are brought together.

    Args:
        owner: has ``calibration_dataloader()``.
        pl_module: the module.

    Returns:
        The batches.
    """
    loader = owner.calibration_dataloader
    answers = getattr(pl_module, "calibration_answers", None)
    takes = "answer_fn" in inspect.signature(loader).parameters
    batches: Iterable[Any] = loader(answer_fn=answers) if takes and callable(answers) else loader()
    return batches


def is_sharded(batches: Iterable[Any]) -> bool:
    """Say whether a distributed sampler gives each rank batches of its own.

    Batches that are the same on all ranks are dealt out to them; dealing twice would lose the others.

    Args:
        batches: the calibration batches.

    Returns:
        True if they are dealt out already.
    """
    return isinstance(getattr(batches, "sampler", None), DistributedSampler)


@dataclass(kw_only=True)
class BasisSource:
    """Obtains a calibration for a set of layers, the same on every rank."""

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

    @property
    def is_file(self) -> bool:
        """Say whether the source is a basis file."""
        return isinstance(self.source, (str, PathLike))

    def obtain(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        modules: Mapping[str, nn.Module],
        resumed: Mapping[str, Any],
    ) -> Calibration:
        """Load, find in the cache, or calibrate.

        Args:
            trainer: for its precision, datamodule and root folder.
            pl_module: the module, on its device.
            modules: layer name -> module.
            resumed: the checkpoint's state, empty at a fresh start.

        Returns:
            The calibration.
        """
        if isinstance(self.source, (str, PathLike)):
            return self.load(Path(self.source), modules, resumed=bool(resumed))
        remembered = resumed.get("path")
        if remembered and all(ranks.gather_objects(Path(remembered).is_file())):
            return self.load(Path(remembered), modules, resumed=True)
        batches = self.batches(trainer, pl_module)
        calls = self.calls(batches)
        self._first = next(iter(calls), None)
        fingerprint = self.fingerprint(modules, calls)
        cached = self._cache_path(trainer, fingerprint)
        if cached is not None and all(ranks.gather_objects(cached.is_file())):
            rank_zero_info(f"Null space: using the cached basis {cached}")
            return self.load(cached, modules, resumed=bool(resumed))
        calibration = self.calibrate(trainer, pl_module, modules, calls, fingerprint, sharded=is_sharded(batches))
        rank_zero_info("Null space of the layers' inputs:\n" + format_table(table_rows(calibration)))
        if cached is not None:
            if trainer.is_global_zero:
                save_calibration(calibration, cached)
            self.path = str(cached)
        return calibration

    def load(self, path: Path, modules: Mapping[str, nn.Module], *, resumed: bool) -> Calibration:
        """Read a basis file and check that it belongs here.

        Args:
            path: the file.
            modules: layer name -> module.
            resumed: weights may have been trained since, so only names and shapes of the model are compared.

        Returns:
            The calibration.

        Raises:
            MisconfigurationException: if layers are missing from it.
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

    def batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Any]:
        """Return the calibration batches.

        Raises:
            MisconfigurationException: if nobody provides any.
        """
        if self.source is not None and not isinstance(self.source, (str, PathLike)):
            return self.source
        for owner in (getattr(trainer, "datamodule", None), pl_module):
            if callable(getattr(owner, "calibration_dataloader", None)):
                return calibration_batches(owner, pl_module)
        raise MisconfigurationException(
            "NullSpaceProjection has nothing to calibrate on: `calibration` is None and neither the datamodule nor the "
            "module has a `calibration_dataloader()`. Pass an iterable of batches, a basis file, or add that method."
        )

    def calls(self, batches: Iterable[Any]) -> list[ForwardCall]:
        """Return the batches as forward calls on the CPU, as a list: several passes may be needed."""
        cpu = torch.device("cpu")
        limited = itertools.islice(iter(batches), self.limit_batches)
        return [to_call(batch, self.batch_to_inputs, cpu) for batch in limited]

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

    def fingerprint(self, modules: Mapping[str, nn.Module], calls: Sequence[ForwardCall]) -> dict[str, Any]:
        """Return the fingerprint of model, text and settings, the same on all ranks."""
        data = data_fingerprint(tensor for call in calls for tensor in tensors_of(call))
        digests = ranks.gather_objects(data)
        same = len(set(digests)) == 1
        return {
            "model": model_fingerprint(modules),
            "data": digests[0] if same else combined({str(rank): digest for rank, digest in enumerate(digests)}),
            "settings": self.settings.as_dict(),
        }

    def calibrate(
        self,
        trainer: pl.Trainer | None,
        pl_module: pl.LightningModule,
        modules: Mapping[str, nn.Module],
        calls: Sequence[ForwardCall],
        fingerprint: dict[str, Any],
        *,
        sharded: bool = False,
        progress: Callable[[str, int], None] | None = None,
    ) -> Calibration:
        """Calibrate now; see `calibrate_modules` for the arguments.

        Returns:
            The calibration with its fingerprint.
        """
        device = pl_module.device

        def on_device() -> Iterator[ForwardCall]:
            return (move_call(call, device) for call in calls)

        with inference(trainer, pl_module):
            calibration = calibrate_modules(
                modules,
                pl_module,
                on_device,
                self.settings,
                memory_budget_gb=self.memory_budget_gb,
                keep_moments=self.keep_moments,
                sharded=sharded,
                progress=progress,
            )
        calibration.fingerprint = fingerprint
        return calibration

    def _cache_path(self, trainer: pl.Trainer, fingerprint: Mapping[str, Any]) -> Path | None:
        if self.cache_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        root = Path(trainer.default_root_dir) / "nullspace" if self.cache_dir == "auto" else Path(self.cache_dir)
        path: str = ranks.broadcast_object(str(root / f"{combined(fingerprint)}.safetensors"), 0)
        return Path(path)
