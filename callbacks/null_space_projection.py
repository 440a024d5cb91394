"""Training in the null space of general ability, for any Lightning project.

At the start of training the callback finds the trainable matrices (LoRA adapters, linear layers), learns which input
directions general text uses, and projects adapters once. Gradients are projected in `on_before_optimizer_step`, after
unscaling and before clipping; parameters in a hook of optimizers, after each step that really happens. Before the first
step the function itself is asked whether outputs stay, see `null_space.verification`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.basis_source import BasisSource, CalibrationJob
from nspo_lightning.callbacks.null_space.batches import BatchToInputs
from nspo_lightning.callbacks.null_space.calibration_progress import calibration_progress
from nspo_lightning.callbacks.null_space.facts import FIRST_UPDATES, null_space_facts
from nspo_lightning.callbacks.null_space.fit import Fit
from nspo_lightning.callbacks.null_space.grown import Fitted
from nspo_lightning.callbacks.null_space.hold import Hold, at_start
from nspo_lightning.callbacks.null_space.inference import OutputCheck, calibration_forward, inference, ready
from nspo_lightning.callbacks.null_space.logs import (
    log_start,
    run_folder,
    show_bases,
    show_certificate,
    show_verification,
    step_metrics,
    warn_of_findings,
    write_record,
)
from nspo_lightning.callbacks.null_space.unprotected import (
    Unprotected,
    refuse_strategy,
    report_unprotected,
    require_float32,
    without_unreached,
)
from nspo_lightning.callbacks.null_space.verification import EndToEndCheck, Verification
from nspo_lightning.callbacks.null_space.warm import check_same_null_space, warm_start_of
from nspo_lightning.callbacks.null_space.watch import Buffers, StillStatistics, TrainedParameters
from nspo_lightning.callbacks.protocols import TellsFindings
from nspo_lightning.callbacks.stopping import stop_if_told
from nspo_lightning.compat.lightning import callbacks_of, forget_step_metrics, logs_this_batch
from nspo_lightning.evaluation.diagnosis import NullSpaceFacts
from nspo_lightning.nullspace import (
    BasisSettings,
    Calibration,
    LayerCertificate,
    LayerPlan,
    calibrate_modules,
    plan_layers,
    save_calibration,
)
from nspo_lightning.nullspace.basis import Form, Subspace
from nspo_lightning.nullspace.criteria import Criterion
from nspo_lightning.nullspace.layers import check_targets
from nspo_lightning.nullspace.store import check_fingerprint
from nspo_lightning.policy.warm_start import WarmStart


class NullSpaceProjection(Callback):
    """Keep updates out of the input directions that general text uses.

    Args:
        calibration: A basis file, batches, or None = the ``calibration_dataloader()`` of datamodule or module.
        criterion: What decides how many directions are protected, see `nspo_lightning.nullspace.criteria`.
        threshold: Of the criterion; None = its default.
        target_modules: Layers to hold: None = all trained ones, a regular expression, or a list of names, name endings
            or parent modules.
        unprotected: What to do about trained parameters that cannot be held: ``error``, ``warn`` (they train freely),
            ``freeze`` (they do not train).
        batch_to_inputs: Function from a calibration batch to (forward arguments, mask).
        limit_batches: Use at most this many calibration batches (of each process, where a sampler deals them out).
        form: ``hard`` cuts directions off, ``soft`` damps them (no cut).
        softness: Of the soft form, in units of the mean eigenvalue; larger is freer.
        subspace: ``null``; for comparisons ``random`` (as many random directions), ``weights`` (out of the weights' own
            leading directions instead of the text's), ``protected`` (the opposite) or ``to_learn`` (inside the leading
            directions of the prompts that are trained on).
        project_initialization: Step 1, A <- A P before training.
        project_gradients: Step 2, before each optimizer step.
        project_displacement: Step 3, after each optimizer step.
        freeze_down: Train B only, A stays where step 1 put it.
        min_null_share: With ``auto``, keep at least this share of the directions free.
        max_output_change: With ``auto``, protect at least until an update of norm 1 moves general outputs by at most
            this much (relative to the inputs).
        domain_weights: Weight of each calibration domain; None = equal.
        without_domains: Domains to leave out.
        start_weight: Weight of the starts of answers (the last prompt token and the first three of the answer) in
            what is protected, and with ``contrast`` in what is to be learnt from; None = 0.9 with ``contrast``, else 0.
        domain_limits: Domain -> the most that ``contrast`` may promise of its harm: what a step of a given gain moves
            of outputs there (mean square), 1 = without projection. See `nspo_lightning.nullspace.domain_limits`.
        memory_budget_gb: Limit for second moments held at one time; more passes are made, wide inputs are sketched.
            None = one pass on the CPU, on a GPU 60 % of its free memory.
        keep_moments: Store the second moments by domain in the basis file.
        cache_dir: Keeps calibrations by fingerprint: "auto" = ``<default_root_dir>/nullspace``, None = nowhere.
        seed: Of the random subspace and the sketch.
        verify: Before the first step, move every held matrix inside its null space and see that outputs on a little
            calibration text stay; False = don't look.
        enabled: False = do nothing (plain training), so that one configuration runs both.

    Raises:
        ValueError: If an argument is out of range.
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
        start_weight: float | None = None,
        domain_limits: dict[str, float] | None = None,
        memory_budget_gb: float | None = None,
        keep_moments: bool = False,
        cache_dir: str | PathLike[str] | None = "auto",
        seed: int = 0,
        verify: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if unprotected not in get_args(Unprotected):
            raise ValueError(f"`unprotected` must be 'error', 'warn' or 'freeze', got {unprotected!r}.")
        check_targets(target_modules)
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
            start_weight=start_weight,
            domain_limits=domain_limits,
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
        self.verify = verify
        self.enabled = enabled
        self.calibration: Calibration | None = None
        self._fit = Fit()  # the one under way, or the last one
        self._fitted: Fitted | None = None  # the last one whose start succeeded
        self._resumed: dict[str, Any] = {}  # state of this callback in the checkpoint; empty at a fresh start
        self._start_late: Callable[[], None] | None = None  # starts a fit whose training was over in the checkpoint

    @property
    def verification(self) -> Verification | None:
        """What the check before training found; None = not made."""
        return self._fit.verification

    @property
    def output_change(self) -> float | None:
        """Largest change of the model's outputs on a little calibration text, relative to their largest entry."""
        return self._fit.output_change

    @property
    def state_key(self) -> str:
        """Two instances on different modules keep their states apart."""
        targets = self.target_modules
        scope = targets if isinstance(targets, str) or targets is None else sorted(targets)
        return f"{type(self).__qualname__}{dict(target_modules=scope)!r}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or not self.enabled:
            return
        refuse_strategy(trainer)
        # Freeze early, before a distributed wrapper looks.
        if self.unprotected == "freeze" and any(p.requires_grad for p in pl_module.parameters()):
            plan = self._plan(trainer, pl_module)
            for parameter in report_unprotected(plan, self.unprotected, self.target_modules):
                parameter.requires_grad_(False)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_late = lambda: self.on_train_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note_growth()
        self._fit.hold.release()
        self._fit, self._start_late = Fit(), None
        if not self.enabled:
            return
        ranks.reshard(pl_module)
        plan = self._plan(trainer, pl_module, resumed=True)
        # A fit goes on from an earlier one if a checkpoint says so, or if these very matrices were held before, or if
        # it starts from an adapter that was trained in this very null space, which is checked below.
        goes_on = bool(self._resumed) or (self._fitted is not None and self._fitted.hold.is_of(plan.layers))
        warm = None if goes_on else warm_start_of(pl_module)
        goes_on = goes_on or warm is not None
        if not goes_on:
            plan = self._plan(trainer, pl_module)
        to_freeze = report_unprotected(plan, self.unprotected, self.target_modules)
        require_float32(plan)
        fit = self._fit
        fit.statistics = StillStatistics(pl_module, self.unprotected)
        fit.hold = self._new_hold(plan)
        with fit.hold.at_start():
            calibration = self._obtain_bases(trainer, pl_module, plan, warm)
        plan, unreached = without_unreached(plan, calibration, self.unprotected)
        hold = fit.hold = self._new_hold(plan)
        hold.set_bases(calibration)
        hold.refuse_swapping(trainer.optimizers)
        hold.freeze_([*to_freeze, *unreached])
        if not goes_on and self.project_initialization:
            hold.start_()
        elif self._keeps_inside:
            hold.refuse_leaks()
        if self.freeze_down:
            hold.freeze_([layer.matrix for layer in plan.layers if layer.kind == "lora"])
        self._note_start(trainer, pl_module, plan, calibration)
        trained = TrainedParameters(pl_module)
        hold.hook(lambda optimizer: trained.check(optimizer, pl_module, self.unprotected))
        if kept := self._resumed.get("kept"):
            fit.kept.load(kept, pl_module.device)
        self._resumed = {}
        self._fitted = Fitted(module=weakref.ref(pl_module), precision=str(trainer.precision), hold=hold)
        log_start(trainer, calibration)
        write_record(trainer, calibration, verification=fit.verification)

    @property
    def _keeps_inside(self) -> bool:
        """Whether updates are to stay in the null space to rounding."""
        return self.settings.form == "hard" and self.project_displacement and self.project_initialization

    def _new_hold(self, plan: LayerPlan) -> Hold:
        return Hold(
            plan.layers,
            references=self._resumed.get("references", {}),
            project_gradients=self.project_gradients,
            project_displacement=self.project_displacement,
        )

    def _note_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: LayerPlan, calibration: Calibration
    ) -> None:
        """Note what outputs and buffers are at the start, and see that outputs stay inside the null space."""
        fit, text = self._fit, self.source.text
        with fit.hold.at_start():
            fit.outputs = OutputCheck(text.first, trainer, pl_module)
        fit.buffers = Buffers(pl_module, text.rows)
        if self.verify:
            check = EndToEndCheck(trainer, pl_module, plan.layers, calibration, calibration_forward(pl_module))
            with fit.hold.at_start():
                fit.verification = check.run(text.rows)
            show_verification(fit.verification)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        forget_step_metrics(trainer, batch_idx, "nullspace/")
        if self._fit.statistics is not None:
            self._fit.statistics.keep(pl_module)

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Lightning clips afterwards, so the clipped norm is the projected one.
        fit, logged = self._fit, logs_this_batch(trainer)
        early = fit.kept.measured < FIRST_UPDATES
        energy = fit.hold.project_gradients_(optimizer, measure=logged or early)
        if energy is not None:
            fit.kept.add(energy)
        if energy is not None and logged:
            fit.energy.append(energy)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # what a step changes, the first one usually does
            self._check_buffers(trainer, pl_module)
            self._warn_of_findings(trainer)
        if energy := self._fit.energy:  # at the Trainer's logging interval; nothing is read from the device in between
            pl_module.log_dict(step_metrics(energy, self.certificates()), on_step=True, on_epoch=False)
            energy.clear()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_buffers(trainer, pl_module)

    def _check_buffers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit.buffers is not None:
            self._fit.buffers.check(trainer, pl_module, self.unprotected)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_late = None
        # Not at the end of training: other callbacks may put other weights in place there (averages, the best ones).
        self.measure_outputs(trainer, pl_module)
        self._warn_of_findings(trainer)
        self._fit.hold.release()

    def _warn_of_findings(self, trainer: pl.Trainer) -> None:
        """Warn of what the null space leaves, where no callback of the run says what to look at."""
        if not any(isinstance(other, TellsFindings) for other in callbacks_of(trainer)):
            warn_of_findings(self.null_space_facts(), self._fit.told)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._fit.hold.release()

    def _note_growth(self) -> None:
        if self._fitted is not None and self.calibration is not None:
            self.calibration = self._fitted.grown(self.calibration)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return settings, fingerprint and path, and where full weights began; bases stay in their file."""
        if self._fitted is None or self.calibration is None:
            return {}
        references = self._fit.hold.whole_references()
        return {
            "started": True,
            "settings": self.settings.as_dict(),
            "fingerprint": self.calibration.fingerprint,
            "path": self.source.path,
            "kept": self._fit.kept.state(),
            **({"references": references} if references else {}),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note that training goes on: A lies in the null space already and B is not zero.

        Raises:
            ValueError: If the checkpoint was made with other settings.
        """
        if not state_dict.get("started"):
            return
        if self.enabled:
            ours = {"settings": self.settings.as_dict()}
            check_fingerprint({"settings": state_dict["settings"]}, ours, "the checkpoint")
        self._resumed = dict(state_dict)

    def certificates(self) -> list[LayerCertificate]:
        """Return each layer's certificate: leak, update norm, bound on the output change."""
        self._start_if_over()
        return self._fit.hold.certificates()

    def _start_if_over(self) -> None:
        """Start a fit whose training was over in its checkpoint, so that no hook did: for what is said at its end."""
        if self._resumed and self._start_late is not None:
            self._start_late()

    def certificate(self) -> dict[str, float]:
        """Return layer name -> leak ||D U_k|| / ||D||; in the soft form -> bound on the relative output change."""
        soft = self.settings.form == "soft"
        return {c.name: c.output_change if soft else c.leak for c in self.certificates()}

    def held_bytes(self) -> int:
        """Return the bytes of the bases; on a GPU they are held there once more."""
        bases = () if self.calibration is None else self.calibration.bases.values()
        return sum(basis.vectors.nbytes for basis in bases)

    def measure_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure how far outputs moved, once a fit, with the weights as they are, and print the certificate."""
        self._start_if_over()
        fit = self._fit
        outputs, fit.outputs = fit.outputs, None
        if outputs is None:
            return
        fit.output_change = outputs.change(trainer, pl_module)
        facts, certificates = self.null_space_facts(), self.certificates()
        if facts is not None:
            show_certificate(facts, len(certificates))
        if self.calibration is not None:
            change, checked = fit.output_change, fit.verification
            write_record(trainer, self.calibration, certificates, output_change=change, verification=checked)

    def null_space_facts(self) -> NullSpaceFacts | None:
        """Return what the null space left of the gradients and how it was kept; None where nothing is held."""
        if self.calibration is None or self._fitted is None:
            return None
        certificates, fit = self.certificates(), self._fit  # in this order: a fit may start for them
        change = fit.output_change
        return null_space_facts(self.calibration, certificates, fit.kept, held=self._keeps_inside, change=change)

    def held_in(self) -> tuple[dict[str, Any], float] | None:
        """Return the fingerprint of the basis and the largest leak out of it; None if nothing is held."""
        certificates = self.certificates()
        if self.calibration is None or not certificates:
            return None
        return self.calibration.fingerprint, max(found.leak for found in certificates)

    def save(self, path: str | PathLike[str]) -> Path:
        """Return the path of a basis file written there, which `calibration` takes.

        It belongs to the model as it was when the bases were made, and to what it has become in training since.

        Raises:
            RuntimeError: Before fit has calibrated.
        """
        if self.calibration is None:
            raise RuntimeError("There is no basis to save yet: it is made at the start of fit.")
        self._note_growth()
        return save_calibration(self.calibration, Path(path))

    def calibrate(
        self,
        pl_module: pl.LightningModule,
        batches: Iterable[Any] | CalibrationJob,
        *,
        trainer: pl.Trainer | None = None,
        sharded: bool = False,
    ) -> Calibration:
        """Return bases that are made now from calibration text, inside or outside fit.

        Args:
            pl_module: The module, on its device.
            batches: Calibration batches, or a job that `BasisSource.find` returned.
            trainer: Its precision is used; None = the module's own.
            sharded: Each rank has batches of its own; else they are the same on all, and dealt out.
        """
        if isinstance(batches, CalibrationJob):
            job = batches
        else:
            layers = plan_layers(pl_module, self.target_modules, resumed=True).layers
            precision = "" if trainer is None else str(trainer.precision)
            job = self.source.job(pl_module, layers, batches, sharded=sharded, precision=precision)
        shown = trainer is None or trainer.progress_bar_callback is not None
        with (
            calibration_progress(visible=shown, ask=lambda: _ask(trainer)) as report,
            inference(trainer, pl_module),
            at_start(job.layers, {}),
        ):
            self.calibration = calibrate_modules(
                {layer.name: layer.module for layer in job.layers},
                calibration_forward(pl_module),
                lambda: (ready(call, trainer, pl_module) for call in job.calls),
                self.settings,
                memory_budget_gb=self.source.memory_budget_gb,
                keep_moments=self.source.keep_moments,
                sharded=job.sharded,
                allow_unreached=self.unprotected != "error",
                progress=report,
                count=len(job.calls),
                say=rank_zero_info,
            )
        if not self.calibration.bases:
            report_unprotected(LayerPlan(layers=(), refusals=()), self.unprotected, self.target_modules)
        self.calibration.fingerprint = job.fingerprint
        return self.calibration

    def _obtain_bases(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: LayerPlan, warm: WarmStart | None
    ) -> Calibration:
        """Keep the bases of an earlier fit, load them, or make them now: those that a warm start was trained in."""
        found: Calibration | CalibrationJob
        if self.calibration is not None and self.source.fits(self.calibration, trainer, pl_module, plan.layers):
            found = self.calibration
        else:
            found = self.source.find(trainer, pl_module, plan.layers, self._resumed or None)
        if warm is not None:
            check_same_null_space(warm, found.fingerprint)
        if isinstance(found, Calibration):
            self.calibration = found
            return found
        made = self.calibrate(pl_module, found, trainer=trainer)
        show_bases(made, run_folder(trainer))
        self.source.keep(trainer, found, made)
        return made

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, resumed: bool = False) -> LayerPlan:
        elsewhere: set[int] = set()
        for other in callbacks_of(trainer):
            if isinstance(other, NullSpaceProjection) and other is not self and other.enabled:
                elsewhere |= plan_layers(pl_module, other.target_modules, resumed=True).held()
        return plan_layers(pl_module, self.target_modules, covered_elsewhere=frozenset(elsewhere), resumed=resumed)


def _ask(trainer: pl.Trainer | None) -> None:
    if trainer is not None:
        stop_if_told(trainer)
