"""What this machine says of itself: how much memory is free, and which numbers its CPU multiplies fast."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

_LIMITS = (  # of a container: what it may use, what it does use
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_FAST_16_BIT = {
    "bfloat16": ("avx512_f", "avx_ne_convert", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "avx_ne_convert", "amx_fp16", "fp16_arith"),
}
"""Names that `torch.cpu.get_capabilities` has for a CPU's instructions, on x86 and on ARM."""


def free_memory() -> int:
    """Return the bytes of main memory that this process can have: the machine's, and no more than its container's."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _LIMITS:
        try:
            free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return free


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has instructions for products in a dtype, which torch else imitates, slowly.

    Returns:
        True where nothing says so, as in earlier versions of torch.
    """
    names, ask = _FAST_16_BIT.get(str(dtype).removeprefix("torch.")), getattr(torch.cpu, "get_capabilities", None)
    if names is None or ask is None:
        return True
    found = ask()
    return not any(name in found for name in names) or any(found.get(name) for name in names)
