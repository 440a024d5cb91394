"""Collect second moments of layer inputs during forward passes, one for each distinct input.

q, k and v read one tensor, gate and up another: layers that are given the *same tensor* (not an equal one) at every
call of the first batch share a moment. That is found while collecting, so it costs no pass of its own. Several domains
are kept apart, as sums and counts, so that they can be weighted, united or left out later without a second pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from nspo_lightning import ranks
from nspo_lightning.compat.torch import version_of
from nspo_lightning.nullspace.covariance import SecondMoment, fold_together, rows_that_count, select_rows
from nspo_lightning.nullspace.domains import STARTS, STARTS_TO_LEARN, TO_LEARN, are_starts, starts_of
from nspo_lightning.nullspace.experts import listen
from nspo_lightning.nullspace.start_means import StartMeans

DEFAULT_DOMAIN = "general"


class RunningSum(Protocol):
    """What is summed over the rows of one input: `SecondMoment`, or `RangeSketch` where that is too large."""

    width: int
    rows: int

    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(n, width)``."""

    def all_reduce(self) -> None:
        """Add up over ranks (cross-rank synchronisation)."""


Sum = TypeVar("Sum", bound=RunningSum)


class RepeatBatch(RuntimeError):
    """Layers that shared an input at one call did not share it at another: run the batch again."""


class SharedInputs:
    """Finds out which modules are fed the same tensors.

    Feed it every call of one or more forward passes; `groups` then maps the first module of each group to all of them.
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[int]] = {}
        self._first_elsewhere: set[str] = set()
        self._serials: dict[int, tuple[weakref.ref[Tensor], int, str, int]] = {}
        self._next = 0

    def see(self, name: str, inputs: Tensor) -> str:
        """Return the module that saw this very tensor first (possibly ``name`` itself), and record the call.

        A tensor that was changed in place since counts as another one.
        """
        known, version = self._serials.get(id(inputs)), version_of(inputs)
        if known is None or known[0]() is not inputs or known[3] != version:
            known = (weakref.ref(inputs), self._next, name, version)
            self._serials[id(inputs)] = known
            self._next += 1
        self._calls.setdefault(name, []).append(known[1])
        if known[2] != name:
            self._first_elsewhere.add(name)
        return known[2]

    def partly_shared(self) -> list[str]:
        """Return modules that head a group although some of their inputs were first seen at another module."""
        return [first for first in self.groups() if first in self._first_elsewhere]

    def groups(self) -> dict[str, list[str]]:
        """Return first module -> modules with the same sequence of inputs, in order of their first call."""
        by_calls: dict[tuple[int, ...], list[str]] = {}
        for name, calls in self._calls.items():
            by_calls.setdefault(tuple(calls), []).append(name)
        return {names[0]: names for names in by_calls.values()}


class OutputEnergy:
    """Running mean of ||y||^2 over the rows that count: the scale that a change of outputs is measured against."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.rows = 0

    def update(self, outputs: Tensor, mask: Tensor | None, counted: Tensor | None) -> None:
        """Add a module's output, shape ``(..., out)``; see `select_rows` for the mask."""
        exact = torch.promote_types(outputs.dtype, torch.float32)
        squares = torch.linalg.vector_norm(outputs.detach(), dim=-1, dtype=exact).square()
        if mask is not None and counted is not None and mask.shape == squares.shape[: mask.ndim]:
            squares = squares.flatten(0, mask.ndim - 1).index_select(0, counted)
        self.rows += squares.numel()
        self.total = self.total + squares.sum(dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The samples of a batch that belong to one domain."""

    domain: str
    samples: Tensor | None
    """Which they are; None = all."""
    mask: Tensor | None
    counted: Tensor | None
    """The mask's `rows_that_count`."""
    positions: Tensor | None = None
    """Where each row stands in its answer's start, 0 = the prompt's last token; for `StartMeans` alone."""


class InputCollector(Generic[Sum]):
    """Context manager that listens to modules and sums the second moments of what enters them.

    Use `begin` and `end` around each forward pass to say which rows count and which domain they belong to.

    Args:
        modules: Name -> module. Hooks see the first positional input of each call.
        groups: Known groups of modules with one input (first -> all); None = find them in the first forward pass.
        only: Groups to sum in this pass; None = all.
        new_sum: Makes the running sum of one input from its first module's name and its width.
        starts_apart: Domains whose answers' starts are summed on their own too (`starts_of`).
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        only: Sequence[str] | None = None,
        new_sum: Callable[[str, int], Sum] = lambda _, width: SecondMoment(width),  # type: ignore[assignment, return-value]
        starts_apart: Iterable[str] = (),
    ) -> None:
        self._modules = dict(modules)
        self._only = None if only is None else frozenset(only)
        self._new_sum = new_sum
        self._starts_apart = sorted(starts_apart)
        self._shared = SharedInputs()
        self._leaders: dict[str, str] = {}
        self._entered: dict[str, list[tuple[weakref.ref[Tensor], int]]] = {}
        self._taken: dict[str, int] = {}
        self._groups: dict[str, list[str]] | None = None
        if groups is not None:
            self._settle({first: list(names) for first, names in groups.items()})
        self._handles: list[Any] = []
        self._mask: Tensor | None = None
        self._starts: Tensor | None = None
        self._parts: dict[torch.device, list[_Part]] = {}
        self._domains: list[str] | None = None
        self._counting = True
        self.moments: dict[str, dict[str, Sum]] = {}
        """Input group (its first module) -> domain -> running sum."""
        self.start_means: dict[str, StartMeans] = {}
        """Input group -> means at the starts of answers that are to be learnt."""
        self.strays: set[str] = set()
        """Layers that were given another tensor than the rest of their group, in a later batch."""
        self.output_energy: dict[str, dict[str, OutputEnergy]] = {}
        """Layer -> domain -> mean squared norm of its outputs."""

    def __enter__(self) -> InputCollector[Sum]:
        heard = {n: m for n, m in self._modules.items() if n not in self._leaders or self._is_summed(self._leaders[n])}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in heard.items()]
        self._handles += listen(heard.values())
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(
        self,
        mask: Tensor | None = None,
        domains: Sequence[str] | None = None,
        *,
        starts: Tensor | None = None,
        counting: bool = True,
    ) -> None:
        """Announce the next forward pass.

        Args:
            mask: True (non-zero) = counts, shape ``(batch, ...)``; None = every row counts.
            domains: The domain of each sample of the batch; None = one domain.
            starts: True = at the start of an answer, shape as the mask: those rows are summed once more, as a domain of
                their own. None = none is.
            counting: False = only find out who shares inputs, or keep a collective forward pass company.
        """
        self._mask, self._counting, self._starts = mask, counting, starts
        self._domains = list(domains) if domains is not None else None
        self._entered.clear()
        self._taken.clear()
        self._parts.clear()

    def end(self) -> None:
        """Close a forward pass; after the first one the groups are settled.

        Raises:
            RepeatBatch: If the pass must be run again, now that it is known who shares inputs.
        """
        for name, leader in self._leaders.items():
            calls = len(self._entered.get(leader, []))
            if name != leader and self._is_summed(leader) and self._taken.get(name, 0) != calls:
                self.strays.add(name)
        if self._groups is None and self._shared.groups():
            self._settle(self._shared.groups())
            conflict = self._shared.partly_shared()
            if conflict and self._counting:
                self.moments.clear()
                self.start_means.clear()
                self.output_energy.clear()
                raise RepeatBatch(f"inputs shared in part by {conflict}")

    def _settle(self, groups: dict[str, list[str]]) -> None:
        self._groups = groups
        self._leaders = {name: first for first, names in groups.items() for name in names}

    def over_ranks(self, name: str) -> dict[str, Sum]:
        """Return an input's sums by domain, added up over ranks (cross-rank synchronisation).

        A domain that this rank did not see counts as zeros.
        """
        local = self.moments.get(name, {})
        if ranks.world_size() == 1:
            return local
        described = ranks.gather_objects({domain: moment.width for domain, moment in local.items()})
        widths = {domain: width for found in described for domain, width in found.items()}
        reduced = {domain: local.get(domain) or self._new_sum(name, widths[domain]) for domain in sorted(widths)}
        for moment in reduced.values():
            moment.all_reduce()
        return reduced

    def start_means_over_ranks(self, name: str) -> StartMeans | None:
        """Return an input's means at the starts of answers to learn, over ranks (cross-rank synchronisation).

        None where no rank saw any.
        """
        means = self.start_means.pop(name, None)
        widths = [width for width in ranks.gather_objects(None if means is None else means.width) if width]
        if not widths:
            return None
        means = means or StartMeans(widths[0])
        means.all_reduce()
        return means

    @property
    def groups(self) -> dict[str, list[str]]:
        """First module -> modules that share its input, in the batches of this rank."""
        return self._groups or {}

    def agreed_groups(self) -> tuple[dict[str, list[str]], set[str]]:
        """Return who shared inputs in all batches of all ranks (cross-rank synchronisation).

        Returns:
            First module -> modules, in one order on all ranks; and the modules set apart, each as a group of its own,
            since they shared an input in some batches only: their sums of this pass are not theirs.
        """
        leaders: dict[str, set[str]] = {}
        apart: set[str] = set()
        for groups, strays in ranks.gather_objects((self.groups, self.strays)):
            apart |= strays
            for first, names in groups.items():
                for name in names:
                    leaders.setdefault(name, set()).add(first)
        apart |= {name for name, firsts in leaders.items() if len(firsts) > 1}
        apart |= {name for name, firsts in leaders.items() if firsts & apart}
        agreed: dict[str, list[str]] = {}
        for name, firsts in leaders.items():
            agreed.setdefault(name if name in apart else min(firsts), []).append(name)
        return agreed, apart

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def listen(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise TypeError(
                    f"{name} must be called with its input as first positional argument, got "
                    f"{type(args[0]).__name__ if args else 'keyword arguments only'}. Leave it out of `target_modules`."
                )
            self._collect(name, args[0], output)

        return listen

    @torch.no_grad()
    def _collect(self, name: str, inputs: Tensor, output: Any) -> None:
        if self._groups is None:
            leader = self._shared.see(name, inputs)
        else:
            leader = self._leaders.setdefault(name, name)  # first called in a later batch: a group of its own
            if leader == name:
                self._groups.setdefault(name, [name])
            if self._is_summed(leader):
                self._compare(name, leader, inputs)
        if not self._counting or not self._is_summed(leader):
            return
        if isinstance(output, Tensor):
            for part, of in self._split(output):
                energy = self.output_energy.setdefault(name, {}).setdefault(part.domain, OutputEnergy())
                energy.update(of, part.mask, part.counted)
        if leader != name:
            return
        by_domain = self.moments.setdefault(name, {})
        for part, of in self._split(inputs):
            rows = of.reshape(-1, of.shape[-1])
            if part.mask is not None and part.counted is not None:
                rows = select_rows(of, part.mask, layer=name, counted=part.counted)
            if part.positions is not None:
                self.start_means.setdefault(name, StartMeans(inputs.shape[-1])).update(rows, part.positions)
                continue
            if part.domain not in by_domain:
                by_domain[part.domain] = self._new_sum(name, inputs.shape[-1])
            by_domain[part.domain].update(rows.detach())
        fold_together(by_domain.values())

    def _is_summed(self, leader: str) -> bool:
        return self._only is None or leader in self._only

    def _compare(self, name: str, leader: str, inputs: Tensor) -> None:
        """Note a layer that is not given what its group's first layer was given, call by call."""
        if leader == name:
            self._entered.setdefault(name, []).append((weakref.ref(inputs), version_of(inputs)))
            return
        calls, number = self._entered.get(leader, []), self._taken.get(name, 0)
        self._taken[name] = number + 1
        if number >= len(calls) or calls[number][0]() is not inputs or calls[number][1] != version_of(inputs):
            self.strays.add(name)

    def _split(self, inputs: Tensor) -> Iterable[tuple[_Part, Tensor]]:
        """Yield the parts of the batch, each with what belongs to it of the tensor."""
        if inputs.device not in self._parts:  # worked out once in a forward pass: it reads from the device
            self._parts[inputs.device] = list(self._parts_on(inputs.device))
        parts = self._parts[inputs.device]
        apart = any(part.samples is not None for part in parts)
        if self._domains is not None and apart and inputs.shape[0] != len(self._domains):
            raise ValueError(
                f"A batch of {len(self._domains)} samples of several domains enters a layer as {inputs.shape[0]} rows: "
                "they cannot be told apart. Give each batch a single domain."
            )
        for part in parts:
            yield part, inputs if part.samples is None else inputs[part.samples]

    def _parts_on(self, device: torch.device) -> Iterator[_Part]:
        # Of rows of answer starts alone, and of prompts to learn from whose starts are known, no other token counts.
        names = self._domains or [DEFAULT_DOMAIN]
        learnt = [i for i, name in enumerate(names) if name == TO_LEARN]
        known = self._starts is not None and bool(self._starts[learnt].any())
        domains = sorted({n for n in names if not are_starts(n)} - ({TO_LEARN} if known else set()))
        whole = None if self._mask is None else self._mask.to(device)
        for domain in domains:
            samples, mask = None, whole
            if self._domains is not None and len(set(self._domains)) > 1:
                samples = torch.tensor([i for i, d in enumerate(self._domains) if d == domain]).to(device)
                mask = None if whole is None else whole[samples]
            counted = None if mask is None else rows_that_count(mask)
            yield _Part(domain=domain, samples=samples, mask=mask, counted=counted)
        yield from self._starts_on(device)

    def _starts_on(self, device: torch.device) -> Iterator[_Part]:
        """Yield the starts of answers: of text to protect, of domains kept apart, of text to learn from."""
        if self._starts is None:
            return
        starts = self._starts.to(device)
        names = self._domains or [DEFAULT_DOMAIN] * len(starts)
        learnt = [i for i, name in enumerate(names) if name == TO_LEARN]
        of = {STARTS: [i for i in range(len(names)) if i not in learnt]}
        of |= {starts_of(d): [i for i, n in enumerate(names) if n in (d, starts_of(d))] for d in self._starts_apart}
        for domain, rows in (of | {STARTS_TO_LEARN: learnt}).items():
            if not rows:
                continue
            learn = domain == STARTS_TO_LEARN
            samples = None if len(rows) == len(names) else torch.tensor(rows).to(device)
            mask = starts if samples is None else starts[samples]
            if bool(mask.any()):
                positions = (mask.long().cumsum(1) - 1)[mask] if learn else None
                counted = rows_that_count(mask)
                yield _Part(domain=domain, samples=samples, mask=mask, counted=counted, positions=positions)
