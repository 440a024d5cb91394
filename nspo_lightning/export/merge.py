"""Merge a trained update into the unquantised base, and measure what rounding the sum does to the null space.

W' = round(W + D) differs from W + D by up to half a unit in the last place of every entry of W'. That error knows
nothing of the null space: relative to a small update it is large in bfloat16 (8 bits of mantissa), and its share along
the protected directions is a leak that the training never had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from nspo_lightning.export.trained import PREFIX, ExportSource, LowRank
from nspo_lightning.nullspace import Calibration, LayerCertificate, certify
from nspo_lightning.policy.identity import policy_fingerprint
from nspo_lightning.policy.loading import load_base
from nspo_lightning.policy.settings import PolicyError, PolicySettings

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What rounding did to one layer."""

    name: str
    before: LayerCertificate | None
    """Of the exact update; None without a basis."""
    after: LayerCertificate | None
    """Of the written weight minus the base's."""
    rounding: float
    """||written - (W + D)||_F / ||D||_F; 0 for D = 0."""


def unquantised_base(source: ExportSource) -> nn.Module:
    """Load the base in the precision that it is stored in, with an earlier adapter merged if the run did that.

    Args:
        source: The checkpoint.

    Returns:
        The model, frozen, on the CPU.

    Raises:
        PolicyError: If it is not the base that the checkpoint was trained on, as far as that can be told.
    """
    settings = replace(source.settings, quantization="none", gradient_checkpointing=False)
    dtype = _stored_dtype(settings)
    base: nn.Module = load_base(replace(settings, dtype=dtype), torch.device("cpu"))
    if settings.adapter is not None:
        from peft import PeftModel

        base = PeftModel.from_pretrained(base, settings.adapter).merge_and_unload()
        base.requires_grad_(False)
    same_arithmetic = source.settings.quantization == "none" and source.settings.dtype == dtype
    if same_arithmetic and policy_fingerprint(base) != source.state["policy"]:
        raise PolicyError(
            f"'{settings.path}' is not the base that the checkpoint was trained on: their fingerprints differ. Give "
            "the original one (with `--config`, if its folder has moved)."
        )
    return base


def _stored_dtype(settings: PolicySettings) -> Literal["float32", "bfloat16", "float16"]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            settings.model_path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError):
        return "float32"  # `load_base` says what is wrong
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return cast(Literal["float32", "bfloat16", "float16"], name if name in {"bfloat16", "float16"} else "float32")


@torch.no_grad()
def merge_(base: nn.Module, source: ExportSource, dtype: Dtype) -> list[MergedLayer]:
    """Add the trained update to the base, in place, and round everything to one dtype.

    Args:
        base: The unquantised base.
        source: The checkpoint.
        dtype: Of what will be written.

    Returns:
        One entry a trained matrix.

    Raises:
        PolicyError: If the base lacks a layer that was trained, or has it in another shape.
    """
    target = getattr(torch, dtype)
    layers = [
        _merge_adapter_layer_(base, source.basis, name, update, target) for name, update in source.adapter().items()
    ]
    if source.settings.lora is None:
        layers = _merge_weights_(base, source.weights, source.basis, target)
    base.to(target)
    config = getattr(base, "config", None)
    if config is not None:
        config.dtype = target
    return layers


def _merge_adapter_layer_(
    base: nn.Module, calibration: Calibration | None, name: str, update: LowRank, target: torch.dtype
) -> MergedLayer:
    module = _module(base, name.removeprefix(PREFIX).removeprefix(PEFT_PREFIX))
    weight = cast(nn.Parameter, module.weight)
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores (in, out)
    old = (weight.T if transposed else weight).float()
    dense = update.dense()
    if dense.shape != old.shape:
        raise PolicyError(f"'{name}' is {tuple(old.shape)} in the base, the adapter's is {tuple(dense.shape)}.")
    written = (old + dense).to(target)
    change = written.double() - old.double()
    before = after = None
    if calibration is not None and name in calibration.layer_names():
        basis, energy = calibration.basis_of(name), calibration.output_energy.get(name)
        before = certify(name, basis, update.down, up=update.up, scale=update.scale, output_energy=energy)
        after = certify(name, basis, change, output_energy=energy)
    weight.data = written.T.contiguous() if transposed else written
    return MergedLayer(name=name, before=before, after=after, rounding=_relative(change - dense, dense))


def _merge_weights_(
    base: nn.Module, weights: Mapping[str, Tensor], basis: Calibration | None, target: torch.dtype
) -> list[MergedLayer]:
    layers = []
    held = basis.layer_names() if basis is not None else set()
    parameters = dict(base.named_parameters())
    for key, trained in weights.items():
        name = key.removeprefix(PREFIX)
        if name not in parameters or parameters[name].shape != trained.shape:
            raise PolicyError(
                f"The base has no parameter '{name}' of shape {tuple(trained.shape)}: is it the right one?"
            )
        old, written = parameters[name].data.double(), trained.to(target)
        layer = key.rpartition(".")[0]
        exact, change = trained.double() - old, written.double() - old
        before = after = None
        if basis is not None and layer in held and name.endswith(".weight"):
            own = basis.basis_of(layer)
            if own.width != exact.shape[1]:
                exact, change = exact.T, change.T
            energy = basis.output_energy.get(layer)
            before = certify(layer, own, exact, output_energy=energy)
            after = certify(layer, own, change, output_energy=energy)
        parameters[name].data = written
        layers.append(MergedLayer(name=name, before=before, after=after, rounding=_relative(change - exact, exact)))
    return layers


def _module(base: nn.Module, name: str) -> nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError as error:
        raise PolicyError(f"The base has no layer '{name}', which was trained: is it the right one?") from error


def _relative(error: Tensor, update: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(update.double()))
    return float(torch.linalg.vector_norm(error.double())) / norm if norm > 0 else 0.0


def certificates(source: ExportSource) -> list[LayerCertificate]:
    """Certify a checkpoint's adapter against its run's basis.

    Args:
        source: The checkpoint.

    Returns:
        One certificate a layer; empty without an adapter or without the basis.
    """
    if source.basis is None:
        return []
    return [
        certify(
            name,
            source.basis.basis_of(name),
            update.down,
            up=update.up,
            scale=update.scale,
            output_energy=source.basis.output_energy.get(name),
        )
        for name, update in source.adapter().items()
        if name in source.basis.layer_names()
    ]
