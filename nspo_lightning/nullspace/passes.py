"""Passes over calibration text: what one batch is, how ranks take turns, and what fits into memory at one time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.nullspace.collect import DEFAULT_DOMAIN, InputCollector, RepeatBatch
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.shapes import input_width

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


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A model and the text that it reads, as often as needed; see `calibrate_modules` for the fields."""

    modules: Mapping[str, nn.Module]
    forward: Callable[..., Any]
    calls: Callable[[], Iterable[ForwardCall]]
    sharded: bool
    report: Callable[[str, int], None]

    def run(self, collector: InputCollector[Any]) -> None:
        """Run all batches of this rank past a collector.

        Raises:
            ValueError: If there are no batches.
        """
        done = 0
        with collector:
            for call, counting in self._turns():
                try:
                    self._forward(collector, call, counting)
                except RepeatBatch:
                    self._forward(collector, call, counting)
                done += 1
                self.report("batches", done)
        if done == 0:
            raise ValueError(_NO_BATCHES)

    def _forward(self, collector: InputCollector[Any], call: ForwardCall, counting: bool) -> None:
        collector.begin(call.mask, call.domains, counting=counting)
        self.forward(*call.args, **call.kwargs)
        collector.end()

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

    def look(self) -> tuple[dict[str, list[str]], int]:
        """Return who shares inputs, from one forward pass, and how many domains there are.

        Raises:
            ValueError: If there are no batches.

        Both are the same on all ranks (cross-rank synchronisation).
        """
        domains: set[str] = set()
        first: ForwardCall | None = None
        for call in self.calls():
            first = first or call
            domains |= set(call.domains or (DEFAULT_DOMAIN,))
        if first is None:
            raise ValueError(_NO_BATCHES)
        collector: InputCollector[SecondMoment] = InputCollector(self.modules)
        with collector:
            self._forward(collector, first, counting=False)
        everywhere = set[str]().union(*ranks.gather_objects(domains))
        return ranks.broadcast_object(collector.groups, 0), len(everywhere)


class PassPlan:
    """Which inputs are summed together; it grows while layers are found that read something of their own.

    Args:
        text: Model and text.
        budget_bytes: Limit for second moments and the workspace of their decomposition; None = one pass.

    Attributes:
        groups: First layer -> layers that read the same input; None = found in the first pass.
        passes: Inputs of each pass; None = all.
        too_wide: Inputs whose second moment does not fit.
    """

    def __init__(self, text: CalibrationText, budget_bytes: float | None) -> None:
        self._modules, self._budget, self._domains = text.modules, budget_bytes, 1
        self.groups: dict[str, list[str]] | None = None
        self.passes: list[list[str] | None] = []
        self.too_wide: list[str] = []
        if budget_bytes is None:
            self.passes.append(None)
        else:
            self.groups, self._domains = text.look()
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
        if self._budget is None:
            if firsts:
                self.passes.append(firsts)
            return
        used = self._budget
        for first in firsts:
            width = input_width(self._modules[first])
            sums = 8.0 if width <= 8192 else 4.0
            # A running sum a domain, one product and one block of gathered rows; then the eigenvectors' workspace.
            need, workspace = width * width * (sums * self._domains + 8.0), width * width * 24.0
            if need + workspace > self._budget:
                self.too_wide.append(first)
            elif used + need + workspace > self._budget:
                self.passes.append([first])
                used = need
            else:
                cast(list[str], self.passes[-1]).append(first)
                used += need
