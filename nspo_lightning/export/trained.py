"""What an export is made from: a checkpoint's trained weights, the settings of its run, its basis and its figures.

Nothing here loads a model: a checkpoint holds the trained parameters alone, and the run's resolved `config.yaml` says
what they belong to. Checkpoints are read with `weights_only`, bases are safetensors: nothing in them is executed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nspo_lightning.callbacks.run_report import SUMMARY
from nspo_lightning.checkpoints import FOLDER, STATE_KEY, last_in, read_checkpoint, updates_in
from nspo_lightning.compat.peft import DOWN, UP
from nspo_lightning.nullspace import Calibration, load_calibration
from nspo_lightning.policy.base_record import gguf_identity, settings_difference
from nspo_lightning.policy.settings import PolicyError, PolicySettings


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One layer's update s B A."""

    down: Tensor
    """A, shape (r, width)."""
    up: Tensor
    """B, shape (out, r)."""
    scale: float
    """s: alpha / r, or alpha / sqrt(r)."""

    def dense(self) -> Tensor:
        """Return s B A in float32, shape (out, width)."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A checkpoint with all that a reader of the export wants to know of it."""

    checkpoint: Path
    config: Mapping[str, Any]
    """The run's resolved configuration."""
    settings: PolicySettings
    weights: Mapping[str, Tensor]
    """Trained parameters by their name in the module (``policy. ...``)."""
    updates: int
    """Steps that the optimizer took."""
    state: Mapping[str, Any]
    """What the module itself noted in the checkpoint."""
    projection: Mapping[str, Any] | None
    """State of `NullSpaceProjection`, None if the run had none."""
    summary: Mapping[str, Any]
    """Figures before and after, empty if the run wrote none."""
    basis: Calibration | None
    basis_path: Path | None
    """Where the basis is or was."""

    def adapter(self) -> dict[str, LowRank]:
        """Return layer name (as in the basis) -> update; empty for a run that trained whole weights."""
        lora = self.settings.lora
        if lora is None:
            return {}
        scale = lora.alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        return {
            name.removesuffix(DOWN): LowRank(down=a, up=self.weights[name.removesuffix(DOWN) + UP], scale=scale)
            for name, a in self.weights.items()
            if name.endswith(DOWN)
        }


def read_trained(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content; ValueError if the file is not there, or none of this project."""
    if path.is_dir():
        if (last := last_in(path / FOLDER) or last_in(path)) is not None:
            raise ValueError(f"{path} is a folder, and `--ckpt` takes a checkpoint's file. Give one, such as {last}.")
        raise ValueError(
            f"{path} is a folder: a sharded checkpoint can't be exported. Consolidate it into one file first "
            "(`python -m lightning.pytorch.utilities.consolidate_checkpoint`)."
        )
    if not path.is_file():
        raise ValueError(f"There is no checkpoint at {path}. Give a file from a run's `checkpoints/` as `--ckpt`.")
    content = read_checkpoint(path)
    if STATE_KEY not in content or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of this project. Give a file from a run's `checkpoints/`.")
    return content


def export_source(
    checkpoint: Path,
    content: Mapping[str, Any],
    config_file: Path,
    config: Mapping[str, Any],
    settings: PolicySettings,
    basis: Path | None = None,
) -> ExportSource:
    """Return a checkpoint together with what belongs to it, checked to fit.

    Args:
        checkpoint: File of the checkpoint.
        content: What `read_trained` found in it.
        config_file: The run's configuration; its `summary.json` stands beside.
        config: Content of that file.
        settings: The policy that it describes.
        basis: The run's basis file; None = where the checkpoint says it is.

    Raises:
        PolicyError: If the configuration does not fit the checkpoint.
        ValueError: If the basis given is another run's.
    """
    state = content[STATE_KEY]
    places: dict[str, str] = state.get("places", {})
    if settings.path not in (state["policy_path"], places.get("path")):
        raise PolicyError(
            f"{checkpoint} was trained on '{state['policy_path']}', but {config_file} names '{settings.path}' as "
            "`model.policy.path`. Give the config.yaml of the checkpoint's own run as `--config`."
        )
    if difference := settings_difference(state.get("base", {}), settings):
        raise PolicyError(
            f"{checkpoint} was trained on another base than {config_file} says: {difference}. Give the config.yaml of "
            "the checkpoint's own run as `--config`."
        )
    # What was beside the run need not be beside us, or be the same.
    there: dict[str, Any] = {name: place for name, place in places.items() if os.path.exists(place)}
    settings = replace(settings, **there)
    gguf = gguf_identity(settings)
    if gguf.get("gguf_sha256") != state.get("base", gguf).get("gguf_sha256"):
        raise PolicyError(
            f"{checkpoint} was trained on the GGUF file '{state['base'].get('gguf')}' of another content than what is "
            f"now at '{settings.path}'. Give that file back its place."
        )
    _check_rank(content["state_dict"], settings, config_file)
    projection = next((s for s in content.get("callbacks", {}).values() if _is_projection(s)), None)
    path = basis or _basis_of(projection, config_file.parent)
    calibration = load_calibration(path) if path is not None and (basis is not None or path.is_file()) else None
    if calibration is not None and projection is not None and calibration.fingerprint != projection["fingerprint"]:
        raise ValueError(f"The basis in {path} is not the one that {checkpoint} was trained with. Give that one.")
    return ExportSource(
        checkpoint=checkpoint,
        config=config,
        settings=settings,
        weights=content["state_dict"],
        updates=updates_in(content),
        state=state,
        projection=projection,
        summary=read_summary(config_file.parent),
        basis=calibration,
        basis_path=path,
    )


def read_summary(run: Path) -> dict[str, Any]:
    """Return the figures that a run wrote, {} without any."""
    file = run / SUMMARY
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def _check_rank(weights: Mapping[str, Tensor], settings: PolicySettings, config: Path) -> None:
    ranks = {value.shape[0] for name, value in weights.items() if name.endswith(DOWN)}
    wanted = set() if settings.lora is None else {settings.lora.r}
    if ranks != wanted and any(name.endswith(DOWN) and ".experts." in name for name in weights):
        raise PolicyError(
            "The checkpoint's adapter is on experts' fused weights too, which `export` can't write yet. The run itself "
            f"wrote its adapter at its end: {config.parent / 'adapter'}. PEFT loads it, and merges it "
            "(`PeftModel.from_pretrained(base, folder).merge_and_unload()`)."
        )
    if ranks != wanted:
        raise PolicyError(
            f"The checkpoint's adapter has rank {sorted(ranks) or 'none'}, {config} says {sorted(wanted) or 'none'}. "
            "Give the config.yaml of the checkpoint's own run as `--config`."
        )


def _is_projection(state: Any) -> bool:
    return isinstance(state, dict) and bool(state.get("started")) and "fingerprint" in state


def _basis_of(projection: Mapping[str, Any] | None, run: Path) -> Path | None:
    """Return where the basis is: as noted (relative to where the run was started), or among the runs' bases."""
    if projection is None or not projection.get("path"):
        return None
    noted = Path(projection["path"])
    places = [noted, *(parent / "nullspace" / noted.name for parent in list(run.parents)[:3])]
    return next((place for place in places if place.is_file()), noted)
