"""An adapter to go on from: its folder says which base and which null space it was trained in.

`null_space.json` beside the adapter's weights is that record. It decides which error is shown; whether an adapter lies
in a null space is measured on its weights, by `NullSpaceProjection`, and never believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspo_lightning.atomic import write_json
from nspo_lightning.policy.adapter import load_adapter_
from nspo_lightning.policy.settings import PolicyError, PolicySettings

if TYPE_CHECKING:
    from torch import nn

RECORD = "null_space.json"
CURES = (
    "Warm up again with this configuration (`python -m nspo_lightning warmup -c CONFIG`), or merge the adapter into an "
    "unquantised base, from which a new one goes on (`policy.merge_adapter: true`, `policy.quantization: none`)."
)
"""What helps wherever a warm start belongs to something else."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What an adapter's folder says of it.

    Attributes:
        policy: Fingerprint of the base, see `policy_fingerprint`.
        policy_path: Its path, for messages.
        basis: Fingerprint of the calibration whose null space it was held in; None = it was held in none.
        leak: Largest leak ||D U_k|| / ||D|| of a layer when it was written; None without a null space.
    """

    policy: str
    policy_path: str
    basis: Mapping[str, Any] | None
    leak: float | None

    def write(self, folder: Path) -> None:
        """Write the record into the adapter's folder."""
        write_json(asdict(self), folder / RECORD)


def read_warm_start(folder: Path) -> WarmStart:
    """Return the record of an adapter's folder.

    Raises:
        PolicyError: If there is no adapter, or none of this project.
    """
    if not folder.is_dir():
        raise PolicyError(
            f"`policy.adapter`: expected an adapter's folder, found nothing at '{folder}'. Mend the path."
        )
    try:
        return WarmStart(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise PolicyError(
            f"`policy.adapter` '{folder}' has been trained, and nothing says in which null space (it has no {RECORD}): "
            "its B is not zero, so projecting its A would change what it does, and no update of it could be kept in "
            "the null space. Set `policy.merge_adapter: true` with `policy.quantization: none` to merge it into the "
            "base first; a new adapter goes on from it. Adapters that `warmup` or `fit` wrote are taken as they are."
        ) from None
    except (ValueError, TypeError) as error:
        raise PolicyError(f"`policy.adapter`: {folder / RECORD} is not what was written ({error}). {CURES}") from error


def load_warm_start_(policy: nn.Module, settings: PolicySettings, fingerprint: str) -> WarmStart:
    """Put an earlier adapter's weights on a policy with a fresh adapter.

    Args:
        policy: The PEFT model.
        settings: `adapter` is the folder.
        fingerprint: Of the policy's base.

    Returns:
        Its record.

    Raises:
        PolicyError: If it is not there, was trained on another base, or has another form.
    """
    folder = Path(str(settings.adapter)).expanduser()
    found = read_warm_start(folder)
    if found.policy != fingerprint:
        raise PolicyError(
            f"`policy.adapter` '{folder}' was trained on another base: '{found.policy_path}' (fingerprint "
            f"{found.policy}), and the policy is '{settings.path}' ({fingerprint}), quantisation "
            f"{settings.quantization}, dtype {settings.dtype}. {CURES}"
        )
    load_adapter_(policy, folder, named=f"`policy.adapter` '{folder}'", cure=f"Use these settings too. {CURES}")
    return found
