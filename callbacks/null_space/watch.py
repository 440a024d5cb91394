"""What may not change during a fit without being seen: which parameters train, and buffers that outputs depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from nspo_lightning import ranks
from nspo_lightning.callbacks.null_space.inference import inference, plain_outputs, ready
from nspo_lightning.callbacks.null_space.unprotected import Unprotected
from nspo_lightning.compat.torch import RunningNorm
from nspo_lightning.nullspace import ForwardCall
from nspo_lightning.terminal import counted

_SHOWN = 8
_MOVED = 1e-6  # relative change of outputs that a buffer makes; rounding of an equal buffer makes none


class TrainedParameters:
    """Notices parameters that begin to train after a fit has started (unfrozen layers, another adapter).

    Args:
        pl_module: The module, whose trainable parameters are known now.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._known = {id(p) for p in pl_module.parameters() if p.requires_grad}

    def check(self, optimizer: Optimizer, pl_module: pl.LightningModule, mode: Unprotected) -> None:
        """Look before a step at what an optimizer would move; of one that the Trainer does not know, of the module's.

        Raises:
            MisconfigurationException: In mode ``error``, naming what has begun to train.
        """
        members = (p for group in optimizer.param_groups for p in group["params"])
        new = {id(p): p for p in members if p.requires_grad and id(p) not in self._known}
        if not new:
            return
        names = [name for name, p in pl_module.named_parameters() if id(p) in new]
        if not names and not self._is_trainers(optimizer, pl_module):
            self._known |= new.keys()  # another model's, which this one's outputs need not depend on
            return
        names = names or ["(not among the module's own)"]
        text = f"{counted(len(new), 'parameter')} began to train during fit: {', '.join(names[:_SHOWN])}"
        if mode == "error":
            raise MisconfigurationException(
                f"{text}. Nothing was calibrated for them, so they cannot be held in the null space. Make them "
                "trainable before fit (`requires_grad=True` from the start; a learning rate of 0 keeps them still), or "
                "set `unprotected='freeze'` (they do not train) or 'warn' (they train freely)."
            )
        if mode == "freeze":
            for parameter in new.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            return
        rank_zero_warn(f"{text}. They train freely and may move general outputs.")
        self._known |= new.keys()

    @staticmethod
    def _is_trainers(optimizer: Optimizer, pl_module: pl.LightningModule) -> bool:
        return any(optimizer is known for known in pl_module.trainer.optimizers)


def running_statistics(pl_module: nn.Module) -> dict[str, RunningNorm]:
    """List normalisations that keep running statistics, by name; those in training mode change them."""
    return {
        name: module
        for name, module in pl_module.named_modules()
        if isinstance(module, RunningNorm) and module.running_mean is not None
    }


def hold_statistics(pl_module: nn.Module, mode: Unprotected) -> list[RunningNorm]:
    """Act on running statistics before training.

    Returns:
        Those that are to stay in eval mode, in mode ``freeze``.

    Raises:
        MisconfigurationException: In mode ``error``, naming them.
    """
    found = {name: module for name, module in running_statistics(pl_module).items() if module.training}
    if not found:
        return []
    names = ", ".join(list(found)[:_SHOWN])
    text = f"{counted(len(found), 'normalisation')} with running statistics in training ({names}), which moves outputs"
    if mode == "error":
        raise MisconfigurationException(
            f"{text} on general inputs whatever the weights do. Put them in eval mode (`module.eval()`, "
            "`track_running_stats=False`), or set `unprotected='freeze'` (they stay as they are) or 'warn'."
        )
    if mode == "warn":
        rank_zero_warn(f"{text}.")
    return list(found.values()) if mode == "freeze" else []


class StillStatistics:
    """Keeps normalisations in eval mode in mode ``freeze``, whoever calls `train()`; see `hold_statistics`.

    Args:
        pl_module: The module, before training.
        mode: What is done about normalisations in training.

    Raises:
        MisconfigurationException: In mode ``error``, if there are any.
    """

    def __init__(self, pl_module: nn.Module, mode: Unprotected) -> None:
        self._mode: Unprotected = mode
        self._norms = hold_statistics(pl_module, mode)
        self._may_be_trained = mode != "warn" and bool(running_statistics(pl_module))

    def keep(self, pl_module: nn.Module) -> None:
        """Look before a batch for what was put into train mode since; raises as at the start."""
        if self._may_be_trained:
            self._norms += [norm for norm in hold_statistics(pl_module, self._mode) if norm not in self._norms]
        for norm in self._norms:
            norm.eval()


class Buffers:
    """Notices buffers that training changes and outputs depend on.

    Args:
        pl_module: The module, whose buffers are copied now.
        calls: Calibration text to see it on, on the CPU.
    """

    def __init__(self, pl_module: pl.LightningModule, calls: Sequence[ForwardCall]) -> None:
        self._calls = list(calls)
        self._before = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}

    @torch.no_grad()
    def moved(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Return the names of changed buffers, if outputs on the text differ between their old and new values."""
        now = dict(pl_module.named_buffers())
        changed = [n for n, old in self._before.items() if n in now and not _equal(old, now[n])]
        if not ranks.any_rank(bool(changed)):
            return []
        if not self._calls:
            rank_zero_warn(
                f"Buffers changed in training ({', '.join(changed[:_SHOWN])}), and no text is at hand to see whether "
                "outputs depend on them."
            )
            return []
        with inference(trainer, pl_module):
            after = [plain_outputs(ready(c, trainer, pl_module), pl_module) for c in self._calls]
            with _in_place(pl_module, {name: self._before[name] for name in changed}):
                before = [plain_outputs(ready(c, trainer, pl_module), pl_module) for c in self._calls]
        pairs = ((a, b) for old, new in zip(before, after, strict=True) for b, a in zip(old, new, strict=True))
        far = any(not float((a - b).abs().max()) <= _MOVED * float(b.abs().max()) for a, b in pairs if b.numel())
        return changed if far else []

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Unprotected) -> None:
        """Act on buffers that have moved outputs since the start.

        Raises:
            MisconfigurationException: Unless the mode is ``warn``.
        """
        names = self.moved(trainer, pl_module)
        if not ranks.any_rank(bool(names)):
            return
        shown = ", ".join(names[:_SHOWN])
        text = f"{counted(len(names), 'buffer')} changed in training and moved outputs on general text: {shown}"
        if mode != "warn":
            raise MisconfigurationException(
                f"{text}. No projection of weights can hold them. Let them be (eval mode, no updates in training), or "
                "set `unprotected='warn'`."
            )
        rank_zero_warn(f"{text}.")


@contextmanager
def _in_place(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of a module's buffers for a while, also of such that were assigned anew."""
    now = _swapped(module, values)
    try:
        yield
    finally:
        _swapped(module, now)


def _swapped(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    old = {}
    for name, value in values.items():
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        old[name] = owner.get_buffer(leaf)
        setattr(owner, leaf, value)
    return old


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other.detach().to(one.device)))
