"""Where the bases come from: a basis file, the cache, or text to calibrate on."""

from __future__ import annotations

import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.batches import BatchToInputs, tensors_of, to_call
from nspo_lightning.callbacks.null_space.text_sample import TextSample
from nspo_lightning.callbacks.protocols import AnswersPrompts, HasCalibrationText
from nspo_lightning.callbacks.stopping import stop_if_told
from nspo_lightning.compat.lightning import datamodule_of, is_fast_dev_run
from nspo_lightning.nullspace import (
    BasisSettings,
    Calibration,
    ForwardCall,
    ProtectedLayer,
    load_calibration,
    save_calibration,
)
from nspo_lightning.nullspace.collect import DEFAULT_DOMAIN
from nspo_lightning.nullspace.domains import STARTS
from nspo_lightning.nullspace.fingerprint import combined, data_fingerprint, differences, model_fingerprint
from nspo_lightning.nullspace.store import (
    BrokenBasisError,
    check_belongs,
    check_fingerprint,
    model_differences,
    refuse,
)
from nspo_lightning.terminal import counted

Source = str | PathLike[str] | Iterable[Any] | None
_SAMPLED = 4  # batches that are read where text is only looked at


def calibration_batches(
    owner: Any, pl_module: pl.LightningModule, settings: BasisSettings, trainer: pl.Trainer | None = None
) -> Iterable[Any]:
    """Return the batches of a `HasCalibrationText`.

    With the model's answers where it takes ``answer_fn``, and with the prompts that are trained on where it takes
    ``to_learn`` and the criterion asks for them. A Trainer's run may be told to stop between two batches of answers.
    """
    return _batches(owner, pl_module, trainer, ["to_learn"] if settings.needs_text_to_learn else [])


def general_batches(
    owner: Any, pl_module: pl.LightningModule, trainer: pl.Trainer | None = None, *, starts: bool = False
) -> Iterable[Any]:
    """Return the batches of a `HasCalibrationText` whose outputs are to stay; see `calibration_batches`.

    With `starts` those of the starts of the policy's own answers come too, where it takes ``starts``.
    """
    return _batches(owner, pl_module, trainer, ["starts"] if starts else [])


def _batches(owner: Any, module: pl.LightningModule, trainer: pl.Trainer | None, more: Iterable[str]) -> Iterable[Any]:
    loader = owner.calibration_dataloader
    taken = inspect.signature(loader).parameters
    wanted: dict[str, Any] = {name: True for name in more if name in taken}
    if "answer_fn" in taken and isinstance(module, AnswersPrompts):
        wanted["answer_fn"] = _answers(module, trainer)
    batches: Iterable[Any] = loader(**wanted)
    return batches


def _answers(module: AnswersPrompts, trainer: pl.Trainer | None) -> Callable[..., list[str]]:
    def answer(prompts: Sequence[Any], max_new_tokens: int | None = None) -> list[str]:
        if trainer is not None:
            stop_if_told(trainer)
        if max_new_tokens is None:  # a module of the user's own may know no limit
            return module.calibration_answers(prompts)
        return module.calibration_answers(prompts, max_new_tokens)

    return answer


def is_sharded(batches: Iterable[Any]) -> bool:
    """Return whether a distributed sampler gives each rank batches of its own."""
    # Batches that are the same on all ranks are dealt out to them; dealing twice would lose the others.
    return isinstance(batches, DataLoader) and isinstance(batches.sampler, DistributedSampler)


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """Layers to calibrate, and the text to do it on."""

    layers: Sequence[ProtectedLayer]
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
    text: TextSample = field(default_factory=TextSample, init=False, repr=False)
    """A little of the calibration text, to see outputs on; empty where only a basis file is given."""

    def __post_init__(self) -> None:
        """Check the limits; one that is not positive raises ValueError."""
        for name in ("limit_batches", "memory_budget_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}. null sets no limit.")

    def find(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
        earlier: Mapping[str, Any] | None,
    ) -> Calibration | CalibrationJob:
        """Return the bases from a file or the cache, or what is to be done where there are none yet.

        Args:
            trainer: For its datamodule, precision and root folder.
            pl_module: May give the text.
            layers: What is held.
            earlier: Fingerprint and path in the checkpoint that training goes on from; None at a fresh start.

        Raises:
            MisconfigurationException: If a basis file lacks layers, or the cache can't be written.
            ValueError: If a basis, or the text, is not the one that it must be.
        """
        if isinstance(self.source, (str, PathLike)):
            self.text = self._sample(trainer, pl_module)
            return self.load(Path(self.source), trainer, pl_module, layers, earlier)
        remembered = None if earlier is None else earlier["path"]
        if remembered and all(ranks.gather_objects(Path(remembered).is_file())):
            self.text = self._sample(trainer, pl_module)
            return self.load(Path(remembered), trainer, pl_module, layers, earlier)
        batches = self.batches(trainer, pl_module)
        job = self.job(pl_module, layers, batches, sharded=is_sharded(batches), precision=str(trainer.precision))
        self.text = TextSample.of(job.calls)
        if earlier is not None:  # training began with other bases, which are gone: only the same text makes them again
            now = _unmoved(job.fingerprint, pl_module, layers, earlier)
            check_fingerprint(earlier["fingerprint"], now, "the checkpoint")
        cached = self._cache_path(trainer, job)
        if cached is None:
            return job
        if all(ranks.gather_objects(cached.is_file())) and (found := self._cached(cached, trainer, pl_module, job)):
            rank_zero_info(f"Null space: using the cached basis {cached}")
            return found
        check_writable(cached.parent)
        return job

    def _cached(
        self, path: Path, trainer: pl.Trainer, pl_module: pl.LightningModule, job: CalibrationJob
    ) -> Calibration | None:
        """Return a cached calibration, None (on all ranks) if its file is broken."""
        found: Calibration | None = None
        try:
            found = self.load(path, trainer, pl_module, job.layers, None)
        except BrokenBasisError as error:
            rank_zero_warn(f"The cached basis is broken and is made again: {error}")
        return None if ranks.any_rank(found is None) else found

    def load(
        self,
        path: Path,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
        earlier: Mapping[str, Any] | None,
    ) -> Calibration:
        """Return the calibration in a basis file, if it was made for this model and these settings; see `find`."""
        calibration = load_calibration(path)
        held, known = {layer.name: layer for layer in layers}, calibration.layer_names().union(calibration.unreached)
        missing = set(held) - known
        if missing:
            raise MisconfigurationException(
                f"The basis file {path} has no basis for {counted(len(missing), 'trained layer')}: "
                f"{sorted(missing)[:5]}. Calibrate with the same `target_modules`.",
            )
        if earlier is not None:
            check_fingerprint(calibration.fingerprint, earlier["fingerprint"], str(path))
        model = model_fingerprint(pl_module, known, str(trainer.precision))
        if earlier is not None:  # training has moved them since
            model = _unmoved({"model": model}, pl_module, layers, earlier)["model"]
        check_belongs(calibration, self.settings.as_dict(), model, path)
        for name in calibration.layer_names() & set(held):
            if (width := calibration.basis_of(name).values.numel()) != held[name].width:
                refuse([f"layer {name}: the file has width {width}, this run wants {held[name].width}"], str(path))
        self.path = str(path)
        return calibration

    def keep(self, trainer: pl.Trainer, job: CalibrationJob, calibration: Calibration) -> None:
        """Write bases that were just made into the cache."""
        cached = self._cache_path(trainer, job)
        if cached is not None:
            if trainer.is_global_zero:
                save_calibration(calibration, cached)
            self.path = str(cached)

    def fits(
        self,
        calibration: Calibration,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
    ) -> bool:
        """Return whether bases at hand are those of this model, this text (where there is any) and these settings."""
        known = calibration.layer_names().union(calibration.unreached)
        if known != {layer.name for layer in layers}:
            return False
        model = model_fingerprint(pl_module, known, str(trainer.precision))
        wanted: dict[str, Any] = {"settings": self.settings.as_dict()}
        if not isinstance(self.source, (str, PathLike)) and (calls := self._calls(trainer, pl_module)):
            self.text = TextSample.of(calls)
            wanted["data"] = _text_fingerprint(calls)
        found = differences(calibration.fingerprint, wanted) + model_differences(calibration, model)
        return not ranks.any_rank(bool(found))

    def batches(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, protected_alone: bool = False
    ) -> Iterable[Any]:
        """Return the calibration batches, or only those whose outputs must stay (no prompt is answered for the others).

        Raises:
            MisconfigurationException: If nobody provides any.
        """
        if isinstance(self.source, Iterator):  # it runs once, and may be needed again
            self.source = list(itertools.islice(self.source, self.limit_batches))
        if self.source is not None and not isinstance(self.source, (str, PathLike)):
            return self.source
        for owner in (datamodule_of(trainer), pl_module):
            if isinstance(owner, HasCalibrationText):
                settings = BasisSettings() if protected_alone else self.settings
                return calibration_batches(owner, pl_module, settings, trainer)
        raise MisconfigurationException(
            "NullSpaceProjection has nothing to calibrate on: `calibration` is None and neither the datamodule nor the "
            "module has a `calibration_dataloader()`. Pass an iterable of batches, a basis file, or add that method."
        )

    def calls(self, batches: Iterable[Any]) -> list[ForwardCall]:
        """Return the batches as forward calls on the CPU."""
        return [to_call(batch, self.batch_to_inputs) for batch in itertools.islice(iter(batches), self.limit_batches)]

    def job(
        self,
        pl_module: pl.LightningModule,
        layers: Sequence[ProtectedLayer],
        batches: Iterable[Any],
        *,
        sharded: bool,
        precision: str,
    ) -> CalibrationJob:
        """Return what is to be done, with the text read.

        Raises:
            ValueError: If the settings name domains that the text has not (all ranks look together).
        """
        calls = self.calls(batches)
        self.settings.shares(set[str]().union(*ranks.gather_objects(_domains(calls))))
        fingerprint = {
            "model": model_fingerprint(pl_module, [layer.name for layer in layers], precision),
            "data": _text_fingerprint(calls),
            "settings": self.settings.as_dict(),
        }
        return CalibrationJob(layers=layers, calls=calls, sharded=sharded, fingerprint=fingerprint)

    def _calls(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[ForwardCall]:
        """Return the calibration text, nothing where nobody provides any."""
        try:
            return self.calls(self.batches(trainer, pl_module))
        except MisconfigurationException:
            return []

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> TextSample:
        """Return a little text where the bases come from a file, nothing where nobody provides any."""
        try:
            batches = self.batches(trainer, pl_module, protected_alone=True)
        except MisconfigurationException:
            return TextSample()
        return TextSample.of(self.calls(itertools.islice(iter(batches), _SAMPLED)))

    def _cache_path(self, trainer: pl.Trainer, job: CalibrationJob) -> Path | None:
        if self.cache_dir is None or is_fast_dev_run(trainer):
            return None
        root = Path(trainer.default_root_dir) / "nullspace" if self.cache_dir == "auto" else Path(self.cache_dir)
        return Path(ranks.broadcast_object(str(root / f"{combined(job.fingerprint)}.safetensors"), 0))


def check_writable(folder: Path) -> None:
    """See before a calibration that its result can be kept (cross-rank synchronisation).

    Raises:
        MisconfigurationException: If it can't, on all ranks.
    """
    problem = ""
    if ranks.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = error.strerror or str(error)
    problem = ranks.broadcast_object(problem, 0)
    if problem:
        raise MisconfigurationException(
            f"Calibrations are kept in {folder} (`cache_dir`), and nothing can be written there: {problem}. Give "
            "another folder, or `cache_dir: null` to keep none."
        )


def _unmoved(
    fingerprint: Mapping[str, Any],
    pl_module: pl.LightningModule,
    layers: Sequence[ProtectedLayer],
    earlier: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a resumed run's fingerprint without what training may have moved since its start.

    Held layers are at their start: B is zero there, or the checkpoint says where the matrix was.
    """
    known = earlier.get("references", {})
    at_start = [la for la in layers if la.name in known or (la.output is not None and la.output.requires_grad)]
    held = {id(p) for layer in at_start for p in (layer.matrix, layer.output) if p is not None}
    free = any(p.requires_grad and id(p) not in held for p in pl_module.parameters())
    moved = {"buffers", "weights"} if free else {"buffers"}
    return {**fingerprint, "model": {key: v for key, v in fingerprint["model"].items() if key not in moved}}


def _domains(calls: Sequence[ForwardCall]) -> set[str]:
    """Return the domains of calibration text, and of answers' starts where they are known."""
    found = {domain for call in calls for domain in call.domains or (DEFAULT_DOMAIN,)}
    return found | ({STARTS} if any(call.starts is not None for call in calls) else set())


def _text_fingerprint(calls: Sequence[ForwardCall]) -> str:
    """Return one digest of the text of all ranks (cross-rank synchronisation)."""
    tensors = (tensor for call in calls for tensor in tensors_of(call))
    digests = ranks.gather_objects(data_fingerprint(tensors, (d for call in calls for d in call.domains or ())))
    same = len(set(digests)) == 1
    return digests[0] if same else combined({str(rank): digest for rank, digest in enumerate(digests)})
