"""Calibration as a job of its own: text in; basis file, its layers as a table, and a picture of the spectrum out.

``python -m nspo_lightning calibrate`` calls `calibrate`. The file that it writes is what
`NullSpaceProjection(calibration=...)` takes, with the same settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import lightning.pytorch as pl
from rich import get_console
from rich.console import Console

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.callbacks.null_space.basis_source import calibration_batches, is_sharded
from nspo_lightning.callbacks.null_space.logs import PROMISED, overview_table, promise_table
from nspo_lightning.callbacks.null_space.overview import DETAILS, remarks, write_details
from nspo_lightning.callbacks.null_space.spectrum_figure import spectrum_figure
from nspo_lightning.callbacks.protocols import HasCalibrationText
from nspo_lightning.cli.run_folder import check_output
from nspo_lightning.evaluation.tables import rich_table
from nspo_lightning.nullspace import Calibration, domain_report, plan_layers
from nspo_lightning.nullspace.domains import is_apart
from nspo_lightning.terminal import counted

_SHOWN = 12  # layers and pairs of domains that are named
_KEPT_MOMENTS_BYTES = 256e6  # second moments by domain go into the file up to this size, unless asked for or refused


def calibrate(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    *,
    out: str | Path,
    projection: NullSpaceProjection | None,
    keep_moments: bool | None,
    trainer: pl.Trainer,
) -> None:
    """Calibrate a module on its datamodule's ``calibration_dataloader()`` and write the basis file.

    Args:
        module: The module, with its policy loaded or loadable by ``configure_model``.
        datamodule: Has ``calibration_dataloader()``.
        out: The basis file, conventionally ending in ``.safetensors``. The picture gets its name with ``.png``,
            the table of all layers' inputs with ``.layers.csv``.
        projection: The callback that will use the file, with all its settings. None = one with its defaults.
        keep_moments: Store second moments by domain. None = if they take less than 256 MB.
        trainer: Its device, precision and datamodule wiring are used.

    Raises:
        TypeError: If the datamodule has no ``calibration_dataloader()``.
    """
    check_output("--out", out)
    Path(out).parent.mkdir(parents=True, exist_ok=True)  # before the work, so that it is not for nothing
    if not isinstance(datamodule, HasCalibrationText):
        raise TypeError(
            f"{type(datamodule).__name__} must have a `calibration_dataloader()`; add one that yields batches."
        )
    callback, console = projection or NullSpaceProjection(), get_console()
    with prepared_for_fit(trainer, module, datamodule):
        callback.source.keep_moments = _keeps(module, callback, keep_moments)
        source = calibration_batches(datamodule, module, callback.settings)
        batches = list(itertools.islice(iter(source), callback.source.limit_batches))
        calibration = callback.calibrate(module, batches, trainer=trainer, sharded=is_sharded(source))
    path, picture = Path(out), Path(out).with_suffix(".png")
    if trainer.is_global_zero:  # all ranks have the same
        callback.save(path)
        spectrum_figure(calibration).savefig(picture, dpi=120)
        _print(console, calibration, _domain_means(calibration), path, picture)
    trainer.strategy.barrier("calibrated")  # nobody looks for the file before it is there


@contextmanager
def prepared_for_fit(
    trainer: pl.Trainer, module: pl.LightningModule, datamodule: pl.LightningDataModule
) -> Iterator[None]:
    """Wire module, data and device as `Trainer.fit` does before its first hook, without optimizers."""
    trainer.strategy.connect(module)
    module.trainer = trainer
    datamodule.trainer = trainer
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    trainer.strategy.setup_environment()
    if trainer.local_rank == 0:
        datamodule.prepare_data()
    trainer.strategy.barrier("prepared")
    datamodule.setup("fit")
    module.setup("fit")
    module.configure_model()
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        datamodule.teardown("fit")
        module.teardown("fit")


def _keeps(module: pl.LightningModule, callback: NullSpaceProjection, keep_moments: bool | None) -> bool:
    if keep_moments is not None:
        return keep_moments
    layers = plan_layers(module, callback.target_modules, resumed=True).layers
    return sum(4.0 * layer.width**2 for layer in layers) <= _KEPT_MOMENTS_BYTES


def _domain_means(calibration: Calibration) -> dict[str, dict[str, float]]:
    """Return ``"a -> b"`` -> means over layers of `domain_report`; empty with one domain."""
    protected = [{d: m for d, m in moments.items() if not is_apart(d)} for moments in calibration.moments.values()]
    reports = [domain_report(moments) for moments in protected if len(moments) > 1]
    if not reports:
        return {}
    return {pair: {key: fmean(r[pair][key] for r in reports) for key in reports[0][pair]} for pair in reports[0]}


def _print(
    console: Console, calibration: Calibration, domains: dict[str, dict[str, float]], path: Path, picture: Path
) -> None:
    details = path.with_suffix(DETAILS)
    write_details(calibration, details)
    tokens = ", ".join(f"{name}: {count:,}" for name, count in calibration.domain_tokens.items())
    console.print(f"What general text uses, and what stays free ({tokens} tokens):")
    console.print(overview_table(calibration))
    for remark in remarks(calibration):
        console.print(f"- {remark}")
    if (promises := promise_table(calibration)) is not None:
        console.print(f"{PROMISED}:")
        console.print(promises)
    if domains:
        apart = sorted(domains.items(), key=lambda found: found[1]["covered"])
        title = "Domains: share of the second's energy inside the first's leading directions (99 %)"
        angles = [
            (pair, f"{v['covered']:.3f}", f"{v['mean_cosine']:.3f}", f"{v['largest_angle_deg']:.0f}°")
            for pair, v in apart[:_SHOWN]
        ]
        console.print(rich_table(title, ("domains", "covered", "mean cosine", "angle"), angles, align="lrrr"))
        if len(apart) > _SHOWN:
            console.print(f"({counted(len(apart), 'pair')} in all; these {_SHOWN} are furthest apart)")
    if missed := calibration.unreached:
        console.print(
            f"No calibration text reaches {counted(len(missed), 'layer')}: {', '.join(missed[:_SHOWN])}"
            f"{' ...' if len(missed) > _SHOWN else ''}. They have no basis: they are frozen, or train freely with "
            "`unprotected: warn`.",
            soft_wrap=True,
        )
    console.print(
        f"Basis: {path} ({path.stat().st_size / 1e6:.1f} MB), spectrum: {picture}, each input: {details}",
        soft_wrap=True,
    )
