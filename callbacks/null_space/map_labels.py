"""What stands in and beside the maps of a null space, the run's picture and the report's: names, powers, colours."""

from __future__ import annotations

from collections.abc import Sequence

_COLOUR_ENDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def short_kind(kind: str) -> str:
    """Return the name of a kind of input without its parents and common endings.

    Example:
        >>> short_kind("self_attn.{q_proj,k_proj,v_proj}"), short_kind("mlp.down_proj"), short_kind("fc")
        ('q k v', 'down', 'fc')
    """
    names = kind.rpartition(".")[2] if "{" not in kind else kind.partition("{")[2].rstrip("}")
    return " ".join(name.strip().removesuffix("_proj") or name for name in names.split(","))


def power(value: float) -> str:
    """Return a number by its first digit and its power of ten.

    Example:
        >>> power(3.2e-5), power(1.0), power(4e-12)
        ('3e-5', '1', '4e-12')
    """
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def colour_end(shares: Sequence[float]) -> float:
    """Return the share at which a scale of colours ends: 1, or less where all are so small that they would look alike.

    Example:
        >>> colour_end([0.11, 0.45]), colour_end([4 / 1536, 4 / 576])
        (1.0, 0.01)
    """
    return next((end for end in _COLOUR_ENDS if max(shares, default=1.0) <= end), 1.0)
