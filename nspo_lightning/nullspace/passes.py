"""Passes over calibration text: what one batch is, how ranks take turns, and what fits into memory at one time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.compat.torch import memory_of
from nspo_lightning.nullspace.basis import working_dtype
from nspo_lightning.nullspace.budget import (
    device_budget,
    peak_bytes,
    plan_passes,
    sketch_columns,
    sketched_together,
)
from nspo_lightning.nullspace.collect import DEFAULT_DOMAIN, InputCollector, RepeatBatch
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.domains import STARTS, are_starts, starts_of
from nspo_lightning.nullspace.experts import ExpertInputs
from nspo_lightning.nullspace.shapes import input_width
from nspo_lightning.terminal import counted

Report = Callable[[str, int, "int | None"], None]
"""Told of a stage (``batches`` of a pass, ``layers``), how many are done (0 as it begins), and of how many if known."""
_NO_BATCHES = "Calibration got no batches. Check `calibration` or the datamodule's `calibration_dataloader()`."


@dataclass(frozen=True, kw_only=True)
class ForwardCall:
    """One calibration batch, ready to run."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    """True (non-zero) = this row's inputs count."""
    domains: Sequence[str] | None = None
    """Domain of each sample."""
    starts: Tensor | None = None
    """True = this row's inputs stand at the start of an answer, shape as the mask; see `domains`. None = not known."""


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A model and the text that it reads, as often as needed; see `calibrate_modules` for the fields."""

    modules: Mapping[str, nn.Module]
    forward: Callable[..., Any]
    calls: Callable[[], Iterable[ForwardCall]]
    sharded: bool
    report: Report
    count: int | None = None
    """Calls in a pass, if known."""
    allow_unreached: bool = False
    starts: bool = False
    """The starts of answers are summed too, as domains of their own."""
    starts_apart: tuple[str, ...] = ()
    """Domains whose answers' starts are summed on their own too."""
    leaves_out: Callable[[str], bool] = lambda _: False
    """Says of a domain whether it is left out of what is protected: its answers' starts are then not summed."""
    limits: int | None = None
    """Domains with limits under `contrast`, see `peak_bytes`; None = another criterion."""

    def run(self, collector: InputCollector[Any]) -> None:
        """Run all batches of this rank past a collector.

        Raises:
            ValueError: If there are no batches.
        """
        done, world = 0, 1 if self.sharded else ranks.world_size()
        turns = None if self.count is None else -(-self.count // world)
        self.report("batches", done, turns)
        with collector:
            for call, counting in self._turns():
                try:
                    self._forward(collector, call, counting)
                except RepeatBatch:
                    self._forward(collector, call, counting)
                done += 1
                self.report("batches", done, turns)
        if done == 0:
            raise ValueError(_NO_BATCHES)

    def _forward(self, collector: InputCollector[Any], call: ForwardCall, counting: bool) -> None:
        collector.begin(call.mask, call.domains, starts=self._starts(call), counting=counting)
        self.forward(*call.args, **call.kwargs)
        collector.end()

    def _starts(self, call: ForwardCall) -> Tensor | None:
        if not self.starts or call.starts is None:
            return None
        names = call.domains or [DEFAULT_DOMAIN] * len(call.starts)
        out = [row for row, name in enumerate(names) if self.leaves_out(name)]
        return call.starts.index_fill(0, torch.tensor(out, device=call.starts.device), 0) if out else call.starts

    def _turns(self) -> Iterator[tuple[ForwardCall, bool]]:
        """Yield this rank's batches; all ranks run equally many, since a sharded model's forward is a collective."""
        world, mine = (1, 0) if self.sharded else (ranks.world_size(), ranks.rank())
        window: list[ForwardCall] = []
        for call in self.calls():
            window.append(call)
            if len(window) == world:
                yield window[mine], True
                window = []
        if window:
            yield (window[mine], True) if mine < len(window) else (window[0], False)

    def device(self) -> torch.device:
        """Return where the first layer's weight is, and with it the inputs and their sums."""
        for module in self.modules.values():
            if isinstance(module, ExpertInputs):  # its weight is no part of it
                return module.device
            for weight in module.parameters():
                return weight.device
        return torch.device("cpu")

    def look(self) -> tuple[dict[str, list[str]], int]:
        """Return who shares inputs, from one forward pass, and how many domains there are.

        Both are the same on all ranks (cross-rank synchronisation).

        Raises:
            ValueError: If there are no batches.
        """
        domains: set[str] = set()
        first: ForwardCall | None = None
        for call in self.calls():
            first = first or call
            domains |= {name for name in call.domains or (DEFAULT_DOMAIN,) if not are_starts(name)}
            if self.starts and call.starts is not None:
                domains |= {STARTS, *map(starts_of, self.starts_apart)}
        if first is None:
            raise ValueError(_NO_BATCHES)
        collector: InputCollector[SecondMoment] = InputCollector(self.modules, starts_apart=self.starts_apart)
        with collector:
            self._forward(collector, first, counting=False)
        everywhere = set[str]().union(*ranks.gather_objects(domains))
        return ranks.broadcast_object(collector.groups, 0), len(everywhere)


class PassPlan:
    """Which inputs are summed together; it grows while layers are found that read something of their own.

    Args:
        text: Model and text.
        budget_bytes: Limit for second moments and the workspace of their decomposition; None = one pass, on a GPU a
            share of its free memory.

    Attributes:
        budget: The limit in force, the same on all ranks.
        groups: First layer -> layers that read the same input; None = found in the first pass.
        passes: Inputs of each pass that is left to make; None = all.
        too_wide: Inputs whose second moment does not fit.
    """

    def __init__(self, text: CalibrationText, budget_bytes: float | None) -> None:
        self._modules, self.domains, self._limits = text.modules, 1, text.limits
        self._device = text.device()
        self.budget = budget_bytes
        if budget_bytes is None and (memory := memory_of(self._device)) is not None:
            self.budget = min(ranks.gather_objects(device_budget(memory[0])))
        self.groups: dict[str, list[str]] | None = None
        self.passes: list[list[str] | None] = []
        self.too_wide: list[str] = []
        if self.budget is None:
            self.passes.append(None)
        else:
            self.groups, self.domains = text.look()
            self._add(list(self.groups))

    def settle(self, groups: dict[str, list[str]], apart: set[str], only: Sequence[str] | None) -> None:
        """Take over what a pass found, and plan what it did not sum.

        Args:
            groups: See `InputCollector.agreed_groups`.
            apart: Layers whose sums of this pass are not theirs.
            only: Inputs of the pass.
        """
        unplanned = set() if only is None else {first for first in groups if first not in (self.groups or {})}
        self.groups = groups
        self._add(sorted(apart | unplanned))

    def _add(self, firsts: list[str]) -> None:
        """Plan passes for inputs."""
        if self.budget is None:
            if firsts:
                self.passes.append(firsts)
            return
        passes, too_wide = plan_passes(
            self._widths(firsts), self.domains, self.budget, self._device.type, limits=self._limits
        )
        self.passes += passes
        self.too_wide += too_wide
        for width in set(self._widths(too_wide).values()):
            sketch_columns(width, self.budget, self.domains)  # refuses a budget that is too small, before any pass

    def next_sketches(self) -> dict[str, int]:
        """Return inputs that are sketched in common passes, and the columns of each."""
        assert self.budget is not None  # without one, no input is too wide
        widths = self._widths(self.too_wide)
        together = sketched_together(widths, self.domains, self.budget)
        self.too_wide = [first for first in self.too_wide if first not in together]
        return {first: sketch_columns(widths[first], self.budget, self.domains) for first in together}

    def describe(self) -> str:
        """Return one line: what is summed how, in how many passes, and where."""
        if self.budget is None or self.groups is None:
            return "one pass over the text"
        planned = [self._widths(only or []) for only in self.passes]
        peaks = [peak_bytes(list(w.values()), self.domains, self._device.type, limits=self._limits) for w in planned]
        most = max(peaks, default=0.0)
        counts = Counter(width for widths in planned for width in widths.values())
        exact = ", ".join(
            f"{count} of width {width} ({str(working_dtype(width, self._device.type)).removeprefix('torch.')})"
            for width, count in sorted(counts.items())
        )
        times = counted(len(planned), "pass")
        line = f"{times} over the text on {self._device}, at most {most / 1e9:.2g} GB: {exact or 'none'}"
        wide = Counter(self._widths(self.too_wide).values())
        sketched = ", ".join(f"{count} of width {width}" for width, count in sorted(wide.items()))
        return line + (f"; sketched in further passes: {sketched}" if sketched else "")

    def _widths(self, firsts: Sequence[str]) -> dict[str, int]:
        return {first: input_width(self._modules[first]) for first in firsts}
