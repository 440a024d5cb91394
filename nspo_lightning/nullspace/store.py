"""A calibration as one safetensors file: thin bases, whole spectra, and a fingerprint in its header.

Layout: ``{i}.vectors`` (width x m, float32), ``{i}.values`` (width, float64), ``{i}.weights`` (soft form only) and, if
kept, ``{i}.moment.{domain}``, for input i; the header's ``nspo`` entry is JSON and holds everything that is not a
tensor. Nothing in the file is executed on load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nspo_lightning.atomic import replacing
from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_set import Calibration, least_energy
from nspo_lightning.nullspace.basis_settings import BasisSettings
from nspo_lightning.nullspace.criteria import RankChoice
from nspo_lightning.nullspace.domain_limits import Promise
from nspo_lightning.nullspace.fingerprint import FORMAT_VERSION, combined, data_fingerprint, differences

_PROBES = 8
_ORTHONORMAL = 1e-3  # float32 rounding of orthonormal columns gives 1e-6


def save_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Write a calibration, complete or not at all, and return the path (conventionally ``.safetensors``)."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    inputs: list[dict[str, Any]] = []
    for index, (first, basis) in enumerate(calibration.bases.items()):
        tensors[f"{index}.vectors"] = basis.vectors.detach().cpu().contiguous().clone()
        tensors[f"{index}.values"] = basis.values.contiguous().clone()
        if basis.weights is not None:
            tensors[f"{index}.weights"] = basis.weights.detach().cpu().contiguous().clone()
        for domain, moment in calibration.moments.get(first, {}).items():
            tensors[f"{index}.moment.{domain}"] = moment.contiguous().clone()
        inputs.append({
            "first": first,
            "layers": calibration.groups[first],
            "complement": basis.complement,
            "choice": asdict(basis.choice),
            "tokens": basis.tokens,
            "subspace": basis.subspace,
            "outside": basis.outside,
            "oblique": basis.oblique,
            "trace": basis.trace,
        })
    header = {
        "version": FORMAT_VERSION,
        "inputs": inputs,
        "settings": calibration.settings.as_dict(),
        "domain_energy": calibration.domain_energy,
        "domain_tokens": calibration.domain_tokens,
        "promises": {domain: asdict(promise) for domain, promise in calibration.promises.items()},
        "fingerprint": calibration.fingerprint,
        "unreached": calibration.unreached,
        "grown": calibration.grown,
    }
    path, text = Path(path), json.dumps(header)
    with replacing(path) as partial:
        metadata = {"nspo": text, "digest": _file_digest(text, tensors), "format": "pt"}
        save_file(tensors, str(partial), metadata=metadata)
    return path


def load_calibration(path: str | Path) -> Calibration:
    """Return a calibration that `save_calibration` wrote, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenBasisError: If it is not a basis file, one of another format version, or its vectors are no basis.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no basis file at {path}. Create it with `python -m nspo_lightning calibrate`, or leave "
            "`calibration` unset to calibrate at the start of fit."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "nspo" not in metadata:
                raise BrokenBasisError(f"{path} is a safetensors file without a null-space header; is it an adapter?")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            header = json.loads(metadata["nspo"])
            version = header["version"]
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BrokenBasisError(f"{path} is not a readable safetensors file ({error}). Calibrate again.") from error
    if version != FORMAT_VERSION:
        raise BrokenBasisError(
            f"{path} has basis format {version}, this version reads {FORMAT_VERSION}. Calibrate again."
        )
    if metadata.get("digest") != _file_digest(metadata["nspo"], tensors):
        raise BrokenBasisError(f"{path} is not what was written: its content was changed since. Calibrate again.")
    calibration = _rebuild(header, tensors)
    for first, basis in calibration.bases.items():
        _check_basis(f"{path}, layer {first}", basis)
    return calibration


def _file_digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of all that a basis file says."""
    return combined({"header": header, "tensors": data_fingerprint(tensors[key] for key in sorted(tensors))})


def _check_basis(where: str, basis: Basis) -> None:
    """Refuse vectors that are no orthonormal columns: projecting with them would protect something else, or nothing."""
    vectors, width = basis.vectors, basis.values.numel()
    if vectors.ndim != 2 or vectors.shape[0] != width or not bool(torch.isfinite(vectors).all()):
        raise BrokenBasisError(
            f"{where}: expected finite vectors of shape ({width}, m), got shape {tuple(vectors.shape)}"
            f"{'' if bool(torch.isfinite(vectors).all()) else ' with values that are not finite'}. Calibrate again."
        )
    # Random combinations find a wrong column as surely as the whole Gram matrix, at a fraction of its cost.
    probes = torch.randn(vectors.shape[1], _PROBES, generator=torch.Generator().manual_seed(0))
    off = torch.linalg.vector_norm(vectors.T @ (vectors @ probes) - probes) / torch.linalg.vector_norm(probes)
    lengths = torch.linalg.vector_norm(vectors, dim=0)
    if vectors.shape[1] and (float(off) > _ORTHONORMAL or float((lengths - 1).abs().max()) > _ORTHONORMAL):
        raise BrokenBasisError(
            f"{where}: the basis vectors are not orthonormal (lengths {float(lengths.min()):.3g} to "
            f"{float(lengths.max()):.3g}), so they project onto nothing that was measured. Calibrate again."
        )


class BrokenBasisError(ValueError):
    """A basis file that can't be read, or holds no basis."""


def check_fingerprint(stored: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Refuse a basis that was made for something else.

    Args:
        stored: The file's fingerprint.
        wanted: What this run expects; keys that one side lacks are not compared.
        source: File name for the message.

    Raises:
        ValueError: Saying what differs.
    """
    refuse(differences(stored, wanted), source)


def check_belongs(calibration: Calibration, settings: Mapping[str, Any], model: Mapping[str, str], path: Path) -> None:
    """Refuse a basis file that was made with other settings, or for another model than one of those that it is for.

    Args:
        calibration: The file's content.
        settings: This run's.
        model: This run's model, as `model_fingerprint` gives it for the file's layers. All of it is compared; only a
            precision that one side does not know is not.
        path: The file.

    Raises:
        ValueError: Saying what differs.
    """
    stored = calibration.fingerprint
    found = differences({"settings": stored.get("settings")}, {"settings": settings})
    refuse(found + model_differences(calibration, model), str(path))


def model_differences(calibration: Calibration, model: Mapping[str, str]) -> list[str]:
    """Return how a model differs from the one that bases were made for; [] also for what grew out of it in them."""
    made_for: dict[str, Any] = {"precision": model.get("precision"), **calibration.fingerprint.get("model", {})}
    unsaid = dict.fromkeys(model)
    for grown in calibration.grown:
        if not differences({**unsaid, **made_for, **grown}, model):
            return []
    return differences({"model": {**unsaid, **made_for}}, {"model": model})


def refuse(found: Sequence[str], source: str) -> None:
    """Refuse a basis that differs from what a run wants.

    Args:
        found: What differs, in words.
        source: Name of the basis file, for the message.

    Raises:
        ValueError: If anything does.
    """
    if found:
        raise ValueError(
            f"The basis in {source} does not belong to this run:\n  "
            + "\n  ".join(found)
            + "\nCalibrate again (leave `calibration` unset, or run `python -m nspo_lightning calibrate`), or give the "
            "callback the settings that the file was made with."
        )


def _rebuild(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    bases, groups, moments = {}, {}, {}
    settings = BasisSettings(**header["settings"])
    for index, entry in enumerate(header["inputs"]):
        first = entry["first"]
        bases[first] = Basis(
            vectors=tensors[f"{index}.vectors"],
            weights=tensors.get(f"{index}.weights"),
            complement=entry["complement"],
            values=tensors[f"{index}.values"].to(torch.float64),
            choice=RankChoice(**entry["choice"]),
            tokens=entry["tokens"],
            subspace=entry["subspace"],
            outside=entry["outside"],
            oblique=entry.get("oblique", False),  # earlier files have no such bases
            trace=entry.get("trace"),
        )
        groups[first] = entry["layers"]
        prefix = f"{index}.moment."
        kept = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if kept:
            moments[first] = kept
    return Calibration(
        bases=bases,
        groups=groups,
        settings=settings,
        output_energy=least_energy(header["domain_energy"], settings),
        domain_energy=header["domain_energy"],
        domain_tokens=header["domain_tokens"],
        moments=moments,
        promises={domain: Promise(**promise) for domain, promise in header.get("promises", {}).items()},
        fingerprint=header["fingerprint"],
        unreached=tuple(header["unreached"]),
        grown=tuple(header["grown"]),
    )
