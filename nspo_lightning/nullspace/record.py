"""What is free and where, as plain values: what a run keeps of its null space beside the bases themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from nspo_lightning.nullspace.basis import Basis
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.diagnostics import LayerCertificate, common_parent, joint_name


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
