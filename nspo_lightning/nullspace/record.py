"""What is free and where, as plain values: what a run keeps of its null space beside the bases themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.diagnostics import LayerCertificate, common_parent, joint_name

_COLOUR_ENDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def places(calibration: Calibration) -> dict[str, tuple[str, int | None]]:
    """Return first layer of each input -> its kind and its depth.

    The depth is the first number in the name, and the kind is the name without it; names without a number are kinds of
    their own and have no depth.
    """
    prefix = common_parent(calibration.layer_names())
    found: dict[str, tuple[str, int | None]] = {}
    for first in calibration.bases:
        name = joint_name(n.removeprefix(prefix) for n in calibration.groups[first]) or "input"
        number = re.search(r"(?<![^.])\d+(?![^.])", name)
        if number is None:
            found[first] = name, None
        else:
            kind = (name[: number.start()] + name[number.end() :]).replace("..", ".").strip(".")
            found[first] = kind, int(number[0])
    return found


def by_kind(calibration: Calibration) -> dict[str, list[tuple[int, Basis]]]:
    """Return kind of input -> (layer number, basis) of each input of that kind, in order.

    See `places`; an input without a depth has the layer number 0.
    """
    panels: dict[str, list[tuple[int, Basis]]] = {}
    for first, (kind, depth) in places(calibration).items():
        panels.setdefault(kind, []).append((depth or 0, calibration.bases[first]))
    return panels


def short_kind(kind: str) -> str:
    """Return the name of a kind of input without its parents and common endings.

    Example:
        >>> short_kind("self_attn.{q_proj,k_proj,v_proj}"), short_kind("mlp.down_proj"), short_kind("fc")
        ('q k v', 'down', 'fc')
    """
    names = kind.rpartition(".")[2] if "{" not in kind else kind.partition("{")[2].rstrip("}")
    return " ".join(name.strip().removesuffix("_proj") or name for name in names.split(","))


def percent(share: float) -> str:
    """Return a share in per cent, to the digits that tell a few directions from none.

    Example:
        >>> percent(0.274), percent(4 / 576), percent(0.0)
        ('27', '0.69', '0')
    """
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.2g}"


def colour_end(shares: Sequence[float]) -> float:
    """Return the share at which a scale of colours ends: 1, or less where all are so small that they would look alike.

    Example:
        >>> colour_end([0.11, 0.45]), colour_end([4 / 1536, 4 / 576])
        (1.0, 0.01)
    """
    return next((end for end in _COLOUR_ENDS if max(shares, default=1.0) <= end), 1.0)


def null_space_record(calibration: Calibration, certificates: Sequence[LayerCertificate] = ()) -> dict[str, Any]:
    """Return what JSON holds of a calibration, and of a certificate where there is one: an entry for each input.

    `free_share` is the share of the input's directions that updates may use, `energy_left` the share of the energy of
    general text in them, and `harm` what the criterion predicts of both: the squared change of general outputs by a
    step that learns as much, relative to training without projection (None where it is not finite).
    """
    by_layer = {certificate.name: certificate for certificate in certificates}
    inputs = []
    for first, (kind, depth) in places(calibration).items():
        basis, layers = calibration.bases[first], calibration.groups[first]
        own = [by_layer[name] for name in layers if name in by_layer]
        inputs.append({
            "kind": kind,
            "depth": depth,
            "layers": list(layers),
            "width": basis.width,
            "free": basis.null_dims,
            "free_share": basis.null_dims / basis.width,
            "energy_left": basis.choice.energy_left,
            "harm": basis.choice.gain if math.isfinite(basis.choice.gain) else None,
            "tokens": basis.tokens,
            "why": basis.choice.reason,
            "leak": max((c.leak for c in own), default=None),
            "bound": max((c.output_change for c in own), default=None),
            "update_norm": math.hypot(*(c.update_norm for c in own)) if own else None,
        })
    return {"settings": calibration.settings.as_dict(), "tokens": dict(calibration.domain_tokens), "inputs": inputs}
