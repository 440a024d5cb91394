"""Training in the null space of general ability, for any Lightning project.

The callback finds the trainable matrices (LoRA adapters, linear layers), learns which input directions general text
uses, and keeps every update out of them. Hooks, in the order in which Lightning runs them:

    setup                     refuse strategies whose gradients or weights cannot be reached
    on_train_start            plan, calibrate or load, project A once, register the post-step hooks
    on_before_optimizer_step  project gradients (before clipping, after unscaling)
    optimizer post-step hook  project parameters, once for each step that really happened
    on_train_batch_end        log, at the Trainer's logging interval only
    on_train_end              certificate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.basis_source import BasisSource
from nspo_lightning.callbacks.null_space.batches import BatchToInputs
from nspo_lightning.callbacks.null_space.inference import OutputCheck, reshard
from nspo_lightning.callbacks.null_space.logs import log_start, logs_now, step_metrics
from nspo_lightning.callbacks.null_space.unprotected import Unprotected, report_unprotected, require_float32
from nspo_lightning.nullspace import (
    Basis,
    BasisSettings,
    Calibration,
    LayerCertificate,
    LayerPlan,
    ProtectedLayer,
    plan_layers,
    save_calibration,
)
from nspo_lightning.nullspace.basis import Form, Subspace
from nspo_lightning.nullspace.criteria import Criterion
from nspo_lightning.nullspace.keeper import GradientEnergy, NullSpaceKeeper
from nspo_lightning.nullspace.store import check_fingerprint

_RESUME_LEAK = 1e-4  # a resumed adapter sits at about 1e-7; anything above this was trained without this basis


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
        limit_batches: use at most this many calibration batches (of each process, where a sampler deals them out).
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
        cache_dir: keeps calibrations by fingerprint: "auto" = ``<default_root_dir>/nullspace``, None = nowhere.
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
        unprotected: Unprotected = "error",
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
        if unprotected not in get_args(Unprotected):
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
        self.source = BasisSource(
            source=calibration,
            settings=self.settings,
            batch_to_inputs=batch_to_inputs,
            limit_batches=limit_batches,
            memory_budget_gb=memory_budget_gb,
            keep_moments=keep_moments,
            cache_dir=cache_dir,
        )
        self.target_modules = target_modules
        self.unprotected = unprotected
        self.project_initialization = project_initialization
        self.project_gradients = project_gradients
        self.project_displacement = project_displacement
        self.freeze_down = freeze_down
        self.enabled = enabled
        self.calibration: Calibration | None = None
        self.output_change: float | None = None
        """Largest change of the model's output on the first calibration batch, relative to its largest entry."""
        self._keepers: dict[int, NullSpaceKeeper] = {}
        self._handles: list[Any] = []
        self._dropped: list[nn.Parameter] = []
        self._energy: list[GradientEnergy] = []
        self._resumed: dict[str, Any] = {}
        self._started = False
        self._check: OutputCheck | None = None

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
            plan = self._plan(trainer, pl_module)
            report_unprotected(plan, self.unprotected, self.target_modules)
            for refusal in plan.refusals:
                refusal.parameter.requires_grad_(False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan, obtain the bases, project the adapters once and hook into the optimizers."""
        if not self.enabled:
            return
        self._remove_hooks()
        reshard(pl_module)
        resumed = self._started or bool(self._resumed)
        plan = self._plan(trainer, pl_module, resumed=resumed)
        if report_unprotected(plan, self.unprotected, self.target_modules):
            self._freeze([refusal.parameter for refusal in plan.refusals])
        require_float32(plan)
        names = {layer.name: layer.module for layer in plan.layers}
        if self.calibration is None or self.calibration.layer_names() != set(names):
            self.calibration = self.source.obtain(trainer, pl_module, names, self._resumed)
        self._build_keepers(trainer, plan)
        first_call = self.source.first_call(trainer, pl_module)
        self._check = None if first_call is None else OutputCheck(first_call)
        if self._check is not None:
            self._check.remember(trainer, pl_module)
        if resumed:
            self._check_resumed()
        elif self.project_initialization:
            for keeper in self._keepers.values():
                keeper.start_()
        if self.freeze_down:
            self._freeze([layer.matrix for layer in plan.layers if layer.kind == "lora"])
        for optimizer in trainer.optimizers:
            keeper = self._keepers[id(optimizer)]
            self._handles.append(optimizer.register_step_post_hook(lambda *_, k=keeper: k.reproject_()))
        self._started, self._resumed = True, {}
        log_start(trainer, self.calibration)

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
            energy = keeper.project_gradients_(measure=logs_now(trainer))
            if energy is not None:
                self._energy.append(energy)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the Trainer's interval; nothing is read from the device in between."""
        if not self._energy:
            return
        pl_module.log_dict(step_metrics(self._energy, self.certificates()), on_step=True, on_epoch=False)
        self._energy.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Certify the result and let go of the optimizers."""
        if not self.enabled or self.calibration is None:
            return
        self._remove_hooks()
        certificates = self.certificates()
        self.output_change = None if self._check is None else self._check.change(trainer, pl_module)
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
            "path": self.source.path,
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
        """Return the path of a basis file written there, which `calibration` takes.

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
        sharded: bool = False,
        progress: Callable[[str, int], None] | None = None,
    ) -> Calibration:
        """Calibrate now, outside fit.

        Args:
            pl_module: the module, on its device.
            batches: calibration batches.
            trainer: for its precision; None = the module's own.
            sharded: each rank has batches of its own; else they are the same on all, and dealt out.
            progress: called with (stage, done).

        Returns:
            The calibration, with its fingerprint.
        """
        plan = plan_layers(pl_module, self.target_modules, resumed=True)
        modules = {layer.name: layer.module for layer in plan.layers}
        calls = self.source.calls(batches)
        fingerprint = self.source.fingerprint(modules, calls)
        self.calibration = self.source.calibrate(
            trainer, pl_module, modules, calls, fingerprint, sharded=sharded, progress=progress
        )
        return self.calibration

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, resumed: bool = False) -> LayerPlan:
        elsewhere: set[int] = set()
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, NullSpaceProjection) and other is not self and other.enabled:
                theirs = plan_layers(pl_module, other.target_modules, resumed=True).layers
                elsewhere |= {id(layer.matrix) for layer in theirs}
                elsewhere |= {id(layer.output) for layer in theirs if layer.output is not None}
        return plan_layers(pl_module, self.target_modules, covered_elsewhere=frozenset(elsewhere), resumed=resumed)

    def _freeze(self, parameters: Sequence[nn.Parameter]) -> None:
        if ranks.world_size() == 1:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        else:
            # DDP waits for the gradient of every parameter it has seen: let it come, and drop it before the step.
            self._dropped = list(parameters)

    def _build_keepers(self, trainer: pl.Trainer, plan: LayerPlan) -> None:
        assert self.calibration is not None
        on_device: dict[tuple[int, torch.device], Basis] = {}
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

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
