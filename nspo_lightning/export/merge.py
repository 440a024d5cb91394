"""Merge a trained update into the unquantised base, and measure what rounding the sum does to the null space.

W' = round(W + D) differs from W + D by up to half a unit in the last place of every entry of W'. The error has parts
along the protected directions too: a leak that the training never had. In bfloat16 (8 bits of mantissa) it is large
beside a small update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from nspo_lightning.checkpoints import PREFIX
from nspo_lightning.compat.peft import MODEL_PREFIX
from nspo_lightning.export.trained import ExportSource, LowRank
from nspo_lightning.nullspace import Calibration, LayerCertificate, certify
from nspo_lightning.policy.adapter import merge_adapter
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import TORCH_DTYPES, from_pretrained, load_base
from nspo_lightning.policy.settings import PolicyError, PolicySettings
from nspo_lightning.policy.tied import untie_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What rounding did to one layer."""

    name: str
    before: LayerCertificate | None
    """Of the exact update; None without a basis."""
    after: LayerCertificate | None
    """Of the written weight minus the base's."""
    rounding: float
    """||written - (W + D)||_F / ||D||_F; infinite for D = 0 where anything was rounded."""
    untied: tuple[str, ...] = ()
    """Layers that had the same weight before."""


def unquantised_base(source: ExportSource) -> PreTrainedModel:
    """Return the frozen base on the CPU, in its stored precision, with an earlier adapter merged if the run did that.

    Raises:
        PolicyError: If it is not the base that the checkpoint was trained on, as far as that can be told.
    """
    settings = replace(source.settings, quantization="none", gradient_checkpointing=False)
    dtype = _stored_dtype(settings)
    base = load_base(replace(settings, dtype=dtype), torch.device("cpu"))
    if settings.merged is not None:
        base = merge_adapter(base, settings.merged)
    same_arithmetic = source.settings.quantization == "none" and source.settings.dtype == dtype
    if same_arithmetic and policy_fingerprint(base) != source.state["policy"]:
        raise PolicyError(
            f"'{settings.path}' is not the base that the checkpoint was trained on: their fingerprints differ. Give "
            "the original one (with `--config`, if its folder has moved)."
        )
    return base


def merged_from(folder: Path, source: ExportSource, dtype: Dtype) -> PreTrainedModel:
    """Return a merged model as it was written into a folder."""
    plain = replace(source.settings, gguf_file=None, revision=None, quantization="none")
    settings = replace(plain, path=str(folder), dtype=dtype)
    return load_base(settings, torch.device("cpu"))


def _stored_dtype(settings: PolicySettings) -> Literal["float32", "bfloat16", "float16"]:
    from transformers import AutoConfig

    try:
        config = from_pretrained(AutoConfig, "model configuration", settings, settings.model_path)
    except PolicyError:
        return "float32"  # `load_base` says what is wrong
    return "bfloat16" if config.dtype == torch.bfloat16 else "float16" if config.dtype == torch.float16 else "float32"


@torch.no_grad()
def merge_(base: PreTrainedModel, source: ExportSource, dtype: Dtype) -> list[MergedLayer]:
    """Return one entry a trained matrix, after adding its update to the base in place; all is rounded to one dtype.

    Raises:
        PolicyError: If the base lacks a layer that was trained, or has it in another shape.
    """
    target = TORCH_DTYPES[dtype]
    if source.settings.lora is None:
        layers = [_merge_weight_(base, source.basis, key, new, target) for key, new in source.weights.items()]
    else:
        layers = [_merge_low_rank_(base, source.basis, key, new, target) for key, new in source.adapter().items()]
    cast(nn.Module, base).to(target)
    base.config.dtype = target
    return layers


def _merge_low_rank_(
    base: PreTrainedModel, calibration: Calibration | None, name: str, update: LowRank, target: torch.dtype
) -> MergedLayer:
    try:
        module: nn.Module = base.get_submodule(name.removeprefix(PREFIX).removeprefix(MODEL_PREFIX))
    except AttributeError as error:
        raise PolicyError(f"The base has no layer '{name}', which was trained: is it the right one?") from error
    untied = untie_(base, module)
    weight = cast(nn.Parameter, module.weight)
    old, dense = _rows(module, weight).float(), update.dense()
    if dense.shape != old.shape:
        raise PolicyError(f"'{name}' is {tuple(old.shape)} in the base, the adapter's is {tuple(dense.shape)}.")
    written = (old + dense).to(target)
    change = written.double() - old.double()
    weight.data = _rows(module, written).contiguous()
    return MergedLayer(
        name=name,
        before=_certificate(calibration, name, update),
        after=_certificate(calibration, name, change),
        rounding=_relative(change - dense, dense),
        untied=tuple(untied),
    )


def _merge_weight_(
    base: nn.Module, calibration: Calibration | None, key: str, trained: Tensor, target: torch.dtype
) -> MergedLayer:
    name = key.removeprefix(PREFIX)
    parameter = dict(base.named_parameters()).get(name)
    if parameter is None or parameter.shape != trained.shape:
        raise PolicyError(f"The base has no parameter '{name}' of shape {tuple(trained.shape)}: is it the right one?")
    old, written = parameter.data.double(), trained.to(target)
    exact, change = trained.double() - old, written.double() - old
    parameter.data = written
    module = base.get_submodule(name.rpartition(".")[0])
    known = calibration is not None and key in calibration.layer_names()
    layer = key if known else key.removesuffix(".weight")  # experts' weights have names of their own
    before, after = (_certificate(calibration, layer, _rows(module, update)) for update in (exact, change))
    return MergedLayer(name=name, before=before, after=after, rounding=_relative(change - exact, exact))


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of shape (out, in) in the form that its module stores, or back: GPT-2's Conv1D has (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return weight.T if isinstance(module, Conv1D) and weight.ndim == 2 else weight


def _certificate(calibration: Calibration | None, layer: str, update: LowRank | Tensor) -> LayerCertificate | None:
    if calibration is None or layer not in calibration.layer_names():
        return None
    basis, energy = calibration.basis_of(layer), calibration.output_energy.get(layer)
    if isinstance(update, Tensor):  # of several experts: one below the other
        return certify(layer, basis, update.reshape(-1, update.shape[-1]), output_energy=energy)
    return certify(layer, basis, update.down, up=update.up, scale=update.scale, output_energy=energy)


def _relative(error: Tensor, update: Tensor) -> float:
    norm, off = (float(torch.linalg.vector_norm(matrix.double())) for matrix in (update, error))
    return off / norm if norm > 0 else math.inf if off > 0 else 0.0


def certificates(source: ExportSource) -> list[LayerCertificate]:
    """Certify a checkpoint's adapter against its run's basis; empty without an adapter or without the basis."""
    found = (_certificate(source.basis, name, update) for name, update in source.adapter().items())
    return [certificate for certificate in found if certificate is not None]
