"""The settings of a run that differ from their defaults, which are read off the constructors' signatures.

Classes that a configuration names are looked up only in packages that are known (`_KNOWN`): reading about a run never
imports what somebody else has written into its folder.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import import_module
from typing import Any

import lightning.pytorch as pl

from nspo_lightning.callbacks import NullSpaceProjection
from nspo_lightning.datamodules import AlignmentDataModule
from nspo_lightning.datamodules.warmup import WarmupSettings
from nspo_lightning.keys import mask_keys
from nspo_lightning.module.grpo_module import GRPOModule
from nspo_lightning.report.records import Setting

_SECTIONS: dict[str, Any] = {
    "model": GRPOModule,
    "data": AlignmentDataModule,
    "nullspace": NullSpaceProjection,
    "trainer": pl.Trainer,
}
_KNOWN = ("nspo_lightning.", "torch.optim.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")
_NOT_SETTINGS = (
    "model.policy.path",
    "data.safety",
    "data.general",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.log_every_n_steps",
)
_LONGEST = 300
_NONE = object()


def non_default_settings(config: Mapping[str, Any], *, warm_start: bool = False) -> tuple[Setting, ...]:
    """Return the settings of a resolved configuration that differ from defaults, in its order.

    What a page says elsewhere (model, data, folders) is left out, and settings of a warm start where the run was none.
    """
    found = []
    sections = {**_SECTIONS, **({"warmup": WarmupSettings} if warm_start else {})}
    for section, owner in sections.items():
        values = config.get(section)
        if isinstance(values, Mapping):
            found += list(_differing(section, values, owner))
    return tuple(setting for setting in found if setting.name not in _NOT_SETTINGS)


def _differing(name: str, values: Mapping[str, Any], owner: Any) -> Iterator[Setting]:
    defaults, hints = _defaults(owner), _hints(owner)
    for key, value in values.items():
        default, path = defaults.get(key, _NONE), f"{name}.{key}"
        inner = _dataclass_of(hints.get(key))
        if isinstance(value, Mapping) and "class_path" in value:
            yield from _of_class(path, value)
        elif isinstance(value, list) and any(isinstance(v, Mapping) and "class_path" in v for v in value):
            for place, entry in enumerate(value):
                yield _joined(f"{path}[{place}]", entry)
        elif isinstance(value, Mapping) and inner is not None:
            start = asdict(default) if is_dataclass(default) and not isinstance(default, type) else None
            yield from _differing(path, value, inner if start is None else (inner, start))
        elif default is _NONE or _plain(value) != _plain(default):
            yield Setting(name=path, value=_said(value), default="" if default is _NONE else _said(default))


def _of_class(path: str, entry: Any) -> Iterator[Setting]:
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        yield Setting(name=path, value=_said(entry), default="")
        return
    class_path = str(entry["class_path"])
    yield Setting(name=path, value=class_path, default="")
    arguments = entry.get("init_args")
    if isinstance(arguments, Mapping):
        yield from _differing(path, arguments, _class(class_path))


def _joined(path: str, entry: Any) -> Setting:
    """Return an entry of a list in one line: its class, and what differs of its arguments."""
    first, *others = _of_class(path, entry)
    told = [f"{setting.name.removeprefix(path).lstrip('.')}: {setting.value}" for setting in others]
    name = first.value.rpartition(".")[2]
    return Setting(name=path, value=f"{name} ({', '.join(told)})" if told else name, default="")


def _class(class_path: str) -> Any:
    """Return a class of a known package; None for others, and where there is none of that name."""
    module, _, name = class_path.rpartition(".")
    if not class_path.startswith(_KNOWN):
        return None
    try:
        return vars(import_module(module)).get(name)
    except ImportError:
        return None


def _defaults(owner: Any) -> dict[str, Any]:
    if isinstance(owner, tuple):  # a dataclass, and the values that it has by default where it is used
        return dict(owner[1])
    if owner is None:
        return {}
    if is_dataclass(owner):
        made = {f.name: f.default_factory() for f in fields(owner) if f.default_factory is not MISSING}
        return made | {f.name: f.default for f in fields(owner) if f.default is not MISSING}
    try:
        parameters = inspect.signature(owner).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _hints(owner: Any) -> dict[str, Any]:
    owner = owner[0] if isinstance(owner, tuple) else owner
    try:
        return typing.get_type_hints(owner if is_dataclass(owner) else owner.__init__)
    except (AttributeError, NameError, TypeError):  # of another package, with names that are not there at run time
        return {}


def _dataclass_of(hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _said(value: Any) -> str:
    value = _plain(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = mask_keys(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
