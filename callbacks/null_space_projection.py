"""Training in the null space of general ability, for any Lightning project.

The callback finds the trainable matrices (LoRA adapters, linear layers), learns which input directions general text
uses, and keeps every update out of them. Hooks, in the order in which Lightning runs them:

    setup                     refuse strategies whose gradients or weights cannot be reached
    on_train_start            plan, calibrate or load, project A once, register the post-step hooks
    on_before_optimizer_step  project gradients (before clipping, after unscaling)
    optimizer post-step hook  project parameters, once for each step that really happened
    on_train_batch_end        log, at the Trainer's logging interval only
    on_train_end              certificate

Needs torch and lightning; peft is recognised by its layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from nspo_lightning.callbacks.null_space_batches import BatchToInputs, first_floating, tensors_of, to_call
from nspo_lightning.nullspace import (
    BasisSettings,
    Calibration,
    ForwardCall,
    LayerCertificate,
    LayerPlan,
    ProtectedLayer,
    calibrate_modules,
    format_table,
    load_calibration,
    plan_layers,
    ranks,
    save_calibration,
    table_rows,
)
from nspo_lightning.nullspace.basis import Form, Subspace
from nspo_lightning.nullspace.criteria import Criterion
from nspo_lightning.nullspace.fingerprint import combined, data_fingerprint, model_fingerprint
from nspo_lightning.nullspace.keeper import GradientEnergy, NullSpaceKeeper
from nspo_lightning.nullspace.layers import adapters_off
from nspo_lightning.nullspace.store import check_fingerprint

_RESUME_LEAK = 1e-4  # a resumed adapter sits at about 1e-7; anything above this was trained without this basis
_OUTPUT_SAMPLES = 1_000_000  # entries of the reference output kept for the certificate (4 MB)


class NullSpaceProjection(Callback):
    """Keep updates out of the input directions that general text uses.

    Args:
        calibration: a basis file; an iterable of batches; or None = the datamodule's ``calibration_dataloader()`` (or
            the module's).
        criterion: what decides how many directions are protected, see `nspo_lightning.nullspace.criteria`.
        threshold: of the criterion; None = its default.
        target_modules: layers to hold: None = all trained ones, a regular expression, or a list of names, name endings
            or parent modules.
        unprotected: what to do about trained parameters that cannot be held: ``error``, ``warn`` (they train freely),
            ``freeze`` (they do not train).
        batch_to_inputs: function from a calibration batch to (forward arguments, mask).
        limit_batches: use at most this many calibration batches.
        form: ``hard`` cuts directions off, ``soft`` damps them (no cut).
        softness: of the soft form, in units of the mean eigenvalue; larger is freer.
        subspace: ``null``; for comparisons ``random`` (as many random directions) or ``protected`` (the opposite).
        project_initialization: step 1, A <- A P before training.
        project_gradients: step 2, before each optimizer step.
        project_displacement: step 3, after each optimizer step.
        freeze_down: train B only, A stays where step 1 put it.
        min_null_share: with ``auto``, keep at least this share of the directions free.
        max_output_change: with ``auto``, protect at least until an update of norm 1 moves general outputs by at most
            this much (relative to the inputs).
        domain_weights: weight of each calibration domain; None = equal.
        without_domains: domains to leave out.
        memory_budget_gb: limit for second moments held at one time; more passes are made, wide inputs are sketched.
        keep_moments: store the second moments by domain in the basis file.
        cache_dir: where calibrations are kept by fingerprint; "auto" = ``<default_root_dir>/nullspace``, None = nowhere.
        seed: of the random subspace and the sketch.
        enabled: False = do nothing (plain training), so that one configuration runs both.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        calibration: str | PathLike[str] | Iterable[Any] | None = None,
        criterion: Criterion = "auto",
        threshold: float | None = None,
        target_modules: str | Sequence[str] | None = None,
        unprotected: Literal["error", "warn", "freeze"] = "error",
        *,
        batch_to_inputs: BatchToInputs | None = None,
        limit_batches: int | None = None,
        form: Form = "hard",
        softness: float = 0.01,
        subspace: Subspace = "null",
        project_initialization: bool = True,
        project_gradients: bool = True,
        project_displacement: bool = True,
        freeze_down: bool = False,
        min_null_share: float = 0.0,
        max_output_change: float | None = None,
        domain_weights: dict[str, float] | None = None,
        without_domains: Sequence[str] = (),
        memory_budget_gb: float | None = None,
        keep_moments: bool = False,
        cache_dir: str | PathLike[str] | None = "auto",
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if unprotected not in ("error", "warn", "freeze"):
            raise ValueError(f"`unprotected` must be 'error', 'warn' or 'freeze', got {unprotected!r}.")
        self.settings = BasisSettings(
            criterion=criterion,
            threshold=threshold,
            form=form,
            softness=softness,
            subspace=subspace,
            min_null_share=min_null_share,
            max_output_change=max_output_change,
            domain_weights=domain_weights,
            without_domains=tuple(without_domains),
            seed=seed,
        )
        self.source = calibration
        self.target_modules = target_modules
        self.unprotected = unprotected
        self.batch_to_inputs = batch_to_inputs
        self.limit_batches = limit_batches
        self.project_initialization = project_initialization
        self.project_gradients = project_gradients
        self.project_displacement = project_displacement
        self.freeze_down = freeze_down
        self.memory_budget_gb = memory_budget_gb
        self.keep_moments = keep_moments
        self.cache_dir = cache_dir
        self.enabled = enabled
        self.calibration: Calibration | None = None
        self.output_change: float | None = None
        """Largest change of the model's output on the first calibration batch, relative to its largest entry."""
        self._keepers: dict[int, NullSpaceKeeper] = {}
        self._handles: list[Any] = []
        self._dropped: list[nn.Parameter] = []
        self._energy: list[GradientEnergy] = []
        self._path: str | None = None
        self._resumed: dict[str, Any] = {}
        self._started = False
        self._reference: Tensor | None = None
        self._check_call: ForwardCall | None = None

    @property
    def state_key(self) -> str:
        """Two instances on different modules keep their states apart."""
        targets = self.target_modules
        scope = targets if isinstance(targets, str) or targets is None else sorted(targets)
        return self._generate_state_key(target_modules=scope)

    # ------------------------------------------------------------------------------------------------ Lightning hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that hide weights or gradients; freeze early, before a distributed wrapper looks.

        Raises:
            MisconfigurationException: under FSDP1 and DeepSpeed.
        """
        if stage != "fit" or not self.enabled:
            return
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
        if self.unprotected == "freeze" and any(p.requires_grad for p in pl_module.parameters()):
            for refusal in self._plan(trainer, pl_module).refusals:
                refusal.parameter.requires_grad_(False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan, obtain the bases, project the adapters once and hook into the optimizers."""
        if not self.enabled:
            return
        self._remove_hooks()
        resumed = self._started or bool(self._resumed)
        plan = self._plan(trainer, pl_module, resumed=resumed)
        self._handle_unprotected(plan, pl_module)
        self._check_precision(plan)
        names = {layer.name: layer.module for layer in plan.layers}
        if self.calibration is None or self.calibration.layer_names() != set(names):
            self.calibration = self._obtain(trainer, pl_module, names)
        self._build_keepers(trainer, plan)
        self._remember_outputs(trainer, pl_module)
        if resumed:
            self._check_resumed()
        elif self.project_initialization:
            for keeper in self._keepers.values():
                keeper.start_()
        if self.freeze_down:
            self._freeze_down(plan)
        for optimizer in trainer.optimizers:
            keeper = self._keepers[id(optimizer)]
            self._handles.append(optimizer.register_step_post_hook(lambda *_, k=keeper: k.reproject_()))
        self._started, self._resumed = True, {}
        self._log_start(trainer)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Project the gradients; Lightning clips afterwards, so the clipped norm is the projected one."""
        if not self.enabled:
            return
        for parameter in self._dropped:
            parameter.grad = None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        keeper = self._keepers.get(id(inner))
        if keeper is not None:
            energy = keeper.project_gradients_(measure=_logs_now(trainer))
            if energy is not None:
                self._energy.append(energy)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the Trainer's interval; nothing is read from the device in between."""
        if not self._energy:
            return
        before = torch.stack([e.before for e in self._energy]).sum()
        after = torch.stack([e.after for e in self._energy]).sum()
        self._energy.clear()
        values = {
            "nullspace/grad_norm_before": before.sqrt(),
            "nullspace/grad_norm_after": after.sqrt(),
            "nullspace/kept_gradient_energy": after / before.clamp_min(torch.finfo(before.dtype).tiny),
        }
        certificates = self.certificates()
        if certificates:
            values["nullspace/leak_max"] = torch.tensor(max(c.leak for c in certificates))
            values["nullspace/update_norm"] = torch.tensor(sum(c.update_norm**2 for c in certificates) ** 0.5)
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Certify the result and let go of the optimizers."""
        if not self.enabled or self.calibration is None:
            return
        self._remove_hooks()
        certificates = self.certificates()
        self.output_change = self._measure_output_change(trainer, pl_module)
        if certificates:
            worst = max(certificates, key=lambda c: c.leak)
            change = "not measured" if self.output_change is None else f"{self.output_change:.2g}"
            rank_zero_info(
                f"Null-space certificate: {len(certificates)} layers, largest leak {worst.leak:.2g} ({worst.name}), "
                f"largest bound on a layer's output change {max(c.output_change for c in certificates):.2g}, largest "
                f"change of outputs on the first calibration batch {change} (relative)."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hooks on the optimizers."""
        self._remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Return settings, fingerprint and path; the bases themselves stay in their file."""
        if not self._started or self.calibration is None:
            return {}
        return {
            "started": True,
            "settings": self.settings.as_dict(),
            "fingerprint": self.calibration.fingerprint,
            "path": self._path,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note that training goes on: A lies in the null space already and B is not zero.

        Raises:
            MisconfigurationException: if the checkpoint was made with other settings.
        """
        if not state_dict.get("started"):
            return
        if self.enabled:
            check_fingerprint(
                {"settings": state_dict["settings"]}, {"settings": self.settings.as_dict()}, "the checkpoint"
            )
        self._resumed = dict(state_dict)

    # ----------------------------------------------------------------------------------------------------- public API

    def certificates(self) -> list[LayerCertificate]:
        """Return each layer's certificate: leak, update norm, bound on the output change."""
        energy = self.calibration.output_energy if self.calibration is not None else {}
        return [c for keeper in self._keepers.values() for c in keeper.certificates(energy)]

    def certificate(self) -> dict[str, float]:
        """Return layer name -> leak ||D U_k|| / ||D||; in the soft form -> bound on the relative output change."""
        soft = self.settings.form == "soft"
        return {c.name: c.output_change if soft else c.leak for c in self.certificates()}

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the basis to a file that `calibration` takes.

        Raises:
            RuntimeError: before fit has calibrated.
        """
        if self.calibration is None:
            raise RuntimeError("There is no basis to save yet: it is made at the start of fit.")
        return save_calibration(self.calibration, Path(path))

    def calibrate(
        self,
        pl_module: pl.LightningModule,
        batches: Iterable[Any],
        *,
        trainer: pl.Trainer | None = None,
        progress: Any = None,
    ) -> Calibration:
        """Calibrate now, outside fit.

        Args:
            pl_module: the module, on its device.
            batches: calibration batches.
            trainer: for its precision; None = the module's own.
            progress: called with (stage, done).

        Returns:
            The calibration, with its fingerprint.
        """
        plan = plan_layers(pl_module, self.target_modules, resumed=True)
        modules = {layer.name: layer.module for layer in plan.layers}
        calls = self._calls(batches, pl_module)
        fingerprint = self._fingerprint(modules, calls)
        self.calibration = self._calibrate(trainer, pl_module, modules, calls, fingerprint, False, progress)
        return self.calibration

    # ------------------------------------------------------------------------------------------------------ internals

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, resumed: bool = False) -> LayerPlan:
        elsewhere: set[int] = set()
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, NullSpaceProjection) and other is not self and other.enabled:
                theirs = plan_layers(pl_module, other.target_modules, resumed=True).layers
                elsewhere |= {id(layer.matrix) for layer in theirs}
                elsewhere |= {id(layer.output) for layer in theirs if layer.output is not None}
        return plan_layers(pl_module, self.target_modules, covered_elsewhere=frozenset(elsewhere), resumed=resumed)

    def _handle_unprotected(self, plan: LayerPlan, pl_module: pl.LightningModule) -> None:
        if plan.refusals:
            lines = "\n  ".join(str(refusal) for refusal in plan.refusals[:12])
            more = f"\n  ... and {len(plan.refusals) - 12} more" if len(plan.refusals) > 12 else ""
            text = f"{len(plan.refusals)} trained parameter(s) cannot be held in the null space:\n  {lines}{more}"
            match self.unprotected:
                case "error":
                    raise MisconfigurationException(
                        f"{text}\nOr set `unprotected='freeze'` (they do not train) or 'warn' (they train freely)."
                    )
                case "warn":
                    rank_zero_warn(f"{text}\nThey train freely and may move general outputs.")
                case "freeze":
                    self._freeze([refusal.parameter for refusal in plan.refusals])
        if not plan.layers:
            raise MisconfigurationException(
                "NullSpaceProjection found no trained LoRA adapter or linear layer"
                + (f" among target_modules={self.target_modules!r}" if self.target_modules is not None else "")
                + ". Check that the module's trainable parameters have `requires_grad=True` before fit."
            )

    def _freeze(self, parameters: Sequence[nn.Parameter]) -> None:
        if ranks.world_size() == 1:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        else:
            # DDP waits for the gradient of every parameter it has seen: let it come, and drop it before the step.
            self._dropped = list(parameters)

    def _freeze_down(self, plan: LayerPlan) -> None:
        self._freeze([layer.matrix for layer in plan.layers if layer.kind == "lora"])

    def _check_precision(self, plan: LayerPlan) -> None:
        low = [layer for layer in plan.layers if layer.matrix.dtype not in (torch.float32, torch.float64)]
        if low:
            raise MisconfigurationException(
                f"{len(low)} trained matrices are in {low[0].matrix.dtype} (first: {low[0].name}); rounding to it alone "
                "leaks about 4e-3 of an update into what is protected. Keep trained weights in float32: "
                "precision='bf16-mixed' or '32-true' instead of 'bf16-true' or '16-true' (peft: "
                "`autocast_adapter_dtype=True`)."
            )

    def _obtain(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, modules: Mapping[str, nn.Module]
    ) -> Calibration:
        source = self.source
        if isinstance(source, (str, PathLike)):
            return self._load(Path(source), modules)
        remembered = self._resumed.get("path")
        if remembered and all(ranks.gather_objects(Path(remembered).is_file())):
            return self._load(Path(remembered), modules)
        batches = self._batches(trainer, pl_module)
        calls = self._calls(batches, pl_module)
        sharded = isinstance(getattr(batches, "sampler", None), DistributedSampler)
        fingerprint = self._fingerprint(modules, calls)
        cached = self._cache_path(trainer, fingerprint)
        if cached is not None and all(ranks.gather_objects(cached.is_file())):
            rank_zero_info(f"Null space: using the cached basis {cached}")
            return self._load(cached, modules)
        calibration = self._calibrate(trainer, pl_module, modules, calls, fingerprint, sharded, None)
        rank_zero_info("Null space of the layers' inputs:\n" + format_table(table_rows(calibration)))
        if cached is not None:
            if trainer.is_global_zero:
                save_calibration(calibration, cached)
            self._path = str(cached)
        return calibration

    def _load(self, path: Path, modules: Mapping[str, nn.Module]) -> Calibration:
        calibration = load_calibration(path)
        wanted: dict[str, Any] = {"settings": self.settings.as_dict()}
        fingerprint = model_fingerprint(modules)
        if not self._resumed:
            wanted["model"] = fingerprint
        else:
            wanted["model"] = {"structure": fingerprint["structure"]}
        check_fingerprint(calibration.fingerprint, wanted, str(path))
        missing = set(modules) - calibration.layer_names()
        if missing:
            raise MisconfigurationException(
                f"The basis file {path} has no basis for {len(missing)} trained layers: {sorted(missing)[:5]}. "
                "Calibrate with the same `target_modules`."
            )
        self._path = str(path)
        return calibration

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Any]:
        if self.source is not None:
            assert not isinstance(self.source, (str, PathLike))
            return self.source
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        for owner in (datamodule, pl_module):
            loader = getattr(owner, "calibration_dataloader", None)
            if callable(loader):
                batches: Iterable[Any] = loader()
                return batches
        raise MisconfigurationException(
            "NullSpaceProjection has nothing to calibrate on: `calibration` is None and neither the datamodule nor the "
            "module has a `calibration_dataloader()`. Pass an iterable of batches, a basis file, or add that method."
        )

    def _calls(self, batches: Iterable[Any], pl_module: pl.LightningModule) -> list[ForwardCall]:
        # Kept on the CPU and as a list: several passes may be needed, and a generator runs once.
        cpu = torch.device("cpu")
        limited = itertools.islice(iter(batches), self.limit_batches)
        return [to_call(batch, self.batch_to_inputs, cpu) for batch in limited]

    def _fingerprint(self, modules: Mapping[str, nn.Module], calls: Sequence[ForwardCall]) -> dict[str, Any]:
        data = data_fingerprint(tensor for call in calls for tensor in tensors_of(call))
        digests = ranks.gather_objects(data)
        return {
            "model": model_fingerprint(modules),
            "data": digests[0] if len(set(digests)) == 1 else combined(dict(enumerate(digests))),
            "settings": self.settings.as_dict(),
        }

    def _cache_path(self, trainer: pl.Trainer, fingerprint: Mapping[str, Any]) -> Path | None:
        if self.cache_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        root = Path(trainer.default_root_dir) / "nullspace" if self.cache_dir == "auto" else Path(self.cache_dir)
        path: str = ranks.broadcast_object(str(root / f"{combined(fingerprint)}.safetensors"), 0)
        return Path(path)

    def _calibrate(
        self,
        trainer: pl.Trainer | None,
        pl_module: pl.LightningModule,
        modules: Mapping[str, nn.Module],
        calls: Sequence[ForwardCall],
        fingerprint: dict[str, Any],
        sharded: bool,
        progress: Any,
    ) -> Calibration:
        device = pl_module.device

        def on_device() -> Iterator[ForwardCall]:
            return (_move(call, device) for call in calls)

        with _inference(trainer, pl_module):
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
        self._check_call = calls[0] if calls else None
        return calibration

    def _build_keepers(self, trainer: pl.Trainer, plan: LayerPlan) -> None:
        assert self.calibration is not None
        on_device: dict[tuple[int, torch.device], Any] = {}
        self._keepers = {}
        remaining: list[ProtectedLayer] = list(plan.layers)
        for optimizer in trainer.optimizers:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            layers = [m for m in remaining if ids & {id(m.matrix), id(m.output)}]
            remaining = [m for m in remaining if m not in layers]
            bases = []
            for layer in layers:
                basis = self.calibration.basis_of(layer.name)
                key = (id(basis), layer.matrix.device)
                bases.append(on_device.setdefault(key, basis.to(layer.matrix.device)))
            self._keepers[id(optimizer)] = NullSpaceKeeper(
                layers,
                bases,
                project_gradients=self.project_gradients,
                project_displacement=self.project_displacement,
            )

    def _check_resumed(self) -> None:
        if self.settings.form == "soft" or not (self.project_displacement and self.project_initialization):
            return
        leaking = {name: leak for name, leak in self.certificate().items() if leak > _RESUME_LEAK}
        if leaking:
            name = max(leaking, key=lambda n: leaking[n])
            raise MisconfigurationException(
                f"The checkpoint's adapter does not lie in the null space of this basis: {len(leaking)} layers leak, "
                f"{name} by {leaking[name]:.2g}. It was trained with another basis or without projection. Give "
                "`calibration` the basis file of that run, or merge the adapter and start a new one."
            )

    def _remember_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a sample of the outputs before training (with adapters off), for the certificate."""
        if self._check_call is None:
            if isinstance(self.source, (str, PathLike)) and not hasattr(trainer.datamodule, "calibration_dataloader"):  # type: ignore[attr-defined]
                return
            batches = (
                self._batches(trainer, pl_module)
                if not isinstance(self.source, (str, PathLike))
                else (
                    trainer.datamodule.calibration_dataloader()  # type: ignore[attr-defined]
                )
            )
            self._check_call = next(iter(self._calls(itertools.islice(iter(batches), 1), pl_module)), None)
        self._reference = self._sample_outputs(trainer, pl_module, adapters=False)

    def _measure_output_change(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
        if self._reference is None:
            return None
        now = self._sample_outputs(trainer, pl_module, adapters=True)
        if now is None or now.shape != self._reference.shape:
            return None
        scale = self._reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return float((now - self._reference).abs().max() / scale)

    def _sample_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, adapters: bool) -> Tensor | None:
        if self._check_call is None:
            return None
        call = _move(self._check_call, pl_module.device)
        with _inference(trainer, pl_module, adapters=adapters):
            output = first_floating(pl_module(*call.args, **call.kwargs))
        if output is None:
            return None
        rows = output.reshape(-1, output.shape[-1])
        if call.mask is not None and call.mask.numel() == rows.shape[0]:
            rows = rows[call.mask.reshape(-1).ne(0)]
        flat = rows.reshape(-1)
        return flat[:: max(flat.numel() // _OUTPUT_SAMPLES, 1)].to(device="cpu", dtype=torch.float32)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _log_start(self, trainer: pl.Trainer) -> None:
        assert self.calibration is not None
        bases = list(self.calibration.bases.values())
        dims = [b.null_dims for b in bases]
        shares = [b.null_dims / b.width for b in bases]
        left = [b.choice.energy_left for b in bases]
        values = {
            "nullspace/null_dims_mean": sum(dims) / len(dims),
            "nullspace/null_dims_min": float(min(dims)),
            "nullspace/null_share_mean": sum(shares) / len(shares),
            "nullspace/energy_left_max": max(left),
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if callable(add_figure) and trainer.is_global_zero:
                figure = _figure(self.calibration)
                if figure is not None:
                    add_figure("nullspace/spectrum", figure, global_step=trainer.global_step, close=False)


def _figure(calibration: Calibration) -> Any:
    try:
        from nspo_lightning.nullspace.picture import spectrum_figure

        return spectrum_figure(calibration)
    except ImportError:  # matplotlib is optional here: the picture is left out, the numbers are logged
        return None


def _logs_now(trainer: pl.Trainer) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(trainer.loggers) and every > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def _move(call: ForwardCall, device: torch.device) -> ForwardCall:
    from lightning.fabric.utilities import move_data_to_device

    args, kwargs, mask = move_data_to_device((call.args, dict(call.kwargs), call.mask), device)
    return ForwardCall(args=args, kwargs=kwargs, mask=mask, domains=call.domains)


@contextmanager
def _inference(trainer: pl.Trainer | None, pl_module: pl.LightningModule, *, adapters: bool = False) -> Iterator[None]:
    """Run forwards without gradients, in eval mode, in the Trainer's precision; modes are restored one by one."""
    modes = [(module, module.training) for module in pl_module.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if trainer is not None:
            stack.enter_context(trainer.precision_plugin.forward_context())
        if not adapters:
            for switch in adapters_off(pl_module):
                stack.enter_context(switch)
        pl_module.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
