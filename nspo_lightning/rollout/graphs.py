"""Which way a policy is decoded, and steps captured as CUDA graphs.

Launching the kernels of one token costs the host more time than the kernels themselves take for the few rows of a
rollout. A captured step is launched whole. Whether a policy's step can be captured, with the processors that a config
asks for, is tried on a few tokens, once a model and config. A graph lives no longer than its bucket: nothing that it
reads may be freed or replaced meanwhile (an adapter switched off, weights merged for sampling, a cast kept by
autocast).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from nspo_lightning.compat.torch import NoDeviceWaits
from nspo_lightning.nullspace.modes import evaluation_mode
from nspo_lightning.policy.parts import PolicyParts
from nspo_lightning.policy.sharing import can_share_prompts
from nspo_lightning.rollout.choosing import NonFiniteLogitsError
from nspo_lightning.rollout.config import Decoding, SamplingConfig
from nspo_lightning.rollout.draft import Draft
from nspo_lightning.rollout.fixed_memory import FixedMemory
from nspo_lightning.rollout.loops import StaticLoop, Step

GRAPHS_PAY_BACK = 64
"""Tokens that must be left for a smaller bucket: capturing one costs a step launched kernel by kernel and the capture
itself, which is another (by the published figures for such a loop, ten graphed steps each), and saves little of a
graphed step, most of which is reading the weights."""

_TRIAL_TOKENS = 6
_known: WeakKeyDictionary[nn.Module, dict[SamplingConfig, str]] = WeakKeyDictionary()


class CapturedStep:
    """A step that runs as it is the first time, is captured at its second run, and is replayed from then on.

    Args:
        step: Reads and writes the same tensors at each run, in the same shapes, and never waits for the device.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._warm = False
        self._graph: _Replays | None = None

    def __call__(self) -> None:
        """Run the step once."""
        if not self._warm:  # libraries set themselves up at a first run, which can't be captured
            self._step()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> _Replays:
        graph = torch.cuda.CUDAGraph()
        # The outer stream is the present one again also after a capture that fails. Other threads (a loader that pins
        # memory, NCCL's watchdog) may go on calling CUDA meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            self._step()
        return graph


class CapturedIfPossible(CapturedStep):
    """A `CapturedStep` that is launched kernel by kernel where its capture fails: the trial had fewer rows."""

    @override
    def _captured(self) -> _Replays:
        try:
            return super()._captured()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a capture only records: nothing that the step reads has changed
            warnings.warn(
                f"A step of sampling can't be captured as a CUDA graph at its number of rows ({_first_line(error)}): "
                "it is launched kernel by kernel, slower, with the same tokens.",
                stacklevel=2,
            )
            return _Launched(self._step)


class _Replays(Protocol):
    def replay(self) -> None: ...


@dataclass(frozen=True)
class _Launched:
    replay: Step


@contextmanager
def capturing(device: torch.device) -> Iterator[None]:
    """Make the surroundings fit for captures: the right device, and no casts that autocast keeps for later.

    A cast made inside a capture would be read outside, before any replay has filled it.
    """
    kind = device.type
    with torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    ):
        if kind != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


def check_decoding(decoding: Decoding, device: torch.device) -> None:
    """Refuse CUDA graphs on a device that has none, with a ValueError."""
    if decoding == "graphs" and device.type != "cuda":
        raise ValueError(
            f"`sampling.decoding: graphs` captures CUDA graphs, and the policy is on the device '{device}'. Set "
            "`sampling.decoding: auto` (graphs where there is a GPU), or train on one (`trainer.accelerator: gpu`)."
        )


def decoding_for(config: SamplingConfig, parts: PolicyParts, device: torch.device, share_prefix: bool) -> Decoding:
    """Decide how a policy is decoded.

    Args:
        config: `decoding` is what was asked for.
        parts: The policy.
        device: Where it is.
        share_prefix: Whether prompts are to be shared; "auto" takes the plain path literally.

    Returns:
        "dynamic", "static" or "graphs". Where "auto" can't take graphs on CUDA, one warning says why.

    Raises:
        ValueError: If what was asked for can't be done.
    """
    decoding = config.decoding
    check_decoding(decoding, device)
    if decoding == "dynamic" or (decoding == "auto" and (device.type != "cuda" or not share_prefix)):
        return "dynamic"
    if not can_share_prompts(parts.model):
        if decoding == "auto":  # the model's warning has said why
            return "dynamic"
        reason = "its attention can't be taken over, see the warning about sharing prompts"
    elif decoding == "static":
        return decoding
    else:
        reason = why_not_captured(parts, config)
    if not reason:
        return "graphs"
    if decoding == "auto":
        return "dynamic"
    raise ValueError(
        f"`sampling.decoding: {decoding}` can't be done for {type(parts.model).__name__}: {reason}. Set "
        "`sampling.decoding: auto`, which decodes it dynamically: the same tokens, slower on a GPU."
    )


def why_not_captured(parts: PolicyParts, config: SamplingConfig) -> str:
    """Return why a policy's step can't be captured as a CUDA graph; "" if it can. Tried once a model and config."""
    known = _known.setdefault(parts.model, {})
    if config not in known:
        try:
            known[config] = _try_capture(parts, config)
        except NonFiniteLogitsError:  # spoilt weights: the rollout itself says so, and where
            return ""
        if known[config]:
            warnings.warn(
                f"{type(parts.model).__name__} is decoded without CUDA graphs ({known[config]}): slower, the same "
                "tokens.",
                stacklevel=3,
            )
    return known[config]


def _try_capture(parts: PolicyParts, config: SamplingConfig) -> str:
    found = []
    for kind, prepare in (("its step waits for the device", _watched), ("capturing its step failed", CapturedStep)):
        try:
            found.append(_trial(parts, config, prepare))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, KeyError, TypeError) as error:
            return f"{kind}: {_first_line(error)}"
    return "" if found[0].equal(found[1]) else "a trial with graphs drew other tokens"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _watched(step: Step) -> Step:
    def run() -> None:
        with NoDeviceWaits():
            step()

    return run


@torch.no_grad()
def _trial(parts: PolicyParts, config: SamplingConfig, prepare: Callable[[Step], Step]) -> Tensor:
    # Two completions of a prompt of three tokens, drawn with fixed noise.
    device = next(parts.model.parameters()).device
    ids = torch.arange(3, device=device)[None] % parts.vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    uniform = torch.linspace(0.05, 0.95, 2 * _TRIAL_TOKENS, dtype=torch.float64, device=device).view(-1, 2)
    config = replace(config, max_new_tokens=_TRIAL_TOKENS, min_new_tokens=min(config.min_new_tokens, _TRIAL_TOKENS))
    # An EOS that no token is: the processor that counts tokens has to run, and no row may end.
    draft = Draft.begin(ids, mask, group_size=2, config=config, eos_token_ids=(parts.vocab_size,), uniform=uniform)
    memory = FixedMemory(parts, 2)
    with evaluation_mode(parts.model), capturing(device):
        StaticLoop(draft, memory, prepare).run(memory.prefill(ids, mask))
    return draft.sequence
