"""Say what a parser has against a configuration: the setting, where it stands, what is expected, and what was meant."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser

from nspo_lightning.cli.given import Given
from nspo_lightning.compat.jsonargparse import Complaint, read_complaint
from nspo_lightning.datamodules import PromptSource

_PLAIN = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
_PACKAGES = (
    *("nspo_lightning.rewards", "nspo_lightning.callbacks", "torch.optim", "torch.optim.lr_scheduler"),
    *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies"),
)
"""Where classes are that a configuration names."""
_EXTRAS = {"openai": "judges", "gguf": "gguf", "lm_eval": "lm-eval", "shtab": "cli"}
"""Packages that are not needed by all, and the extra that brings them."""
_ALIASES = {"rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "learning_rate": "lr", "lora_r": "r"}
"""Names that others use for a setting."""
_MOST_NAMES = 12
_NEAR = 0.6
_OF_SOURCES = {field.name for field in dataclasses.fields(PromptSource)}


def explained(message: str, parser: ArgumentParser, given: Given, subcommand: str = "") -> str:
    """Return what a parser's message says, with the place in the file and what was probably meant.

    Args:
        message: The parser's own.
        parser: Its parser, that of the subcommand where there is one.
        given: The command's arguments.
        subcommand: Its name, which the message may put before keys.

    Returns:
        A line a mistake.
    """
    if message.startswith("unrecognized arguments: "):
        return _unknown_options(message.partition(": ")[2].split(), parser)
    if message.startswith("the following arguments are required: "):
        return _missing([name.removeprefix(f"{subcommand}.") for name in message.partition(": ")[2].split(", ")])
    if found := re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", message):
        return f"`{found[1]}`: expected a value behind it, found none."
    if message.startswith(("Problems parsing config", "Unexpected config")) and (told := given.broken_file()):
        return told
    complaint, names = read_complaint(message), _names(parser)
    sections, below = {name.split(".")[0] for name in names}, complaint.path[1:]
    # `data` is a subcommand and a section: before one of the sections it is the subcommand.
    if complaint.path[:1] == (subcommand,) and (subcommand not in sections or (below and below[0] in sections)):
        complaint = dataclasses.replace(complaint, path=below)
    return tell(complaint, names, given) or message


def tell(complaint: Complaint, known: Iterable[str], given: Given) -> str:
    """Say what a complaint is about; "" where it can't be told.

    Args:
        complaint: About a setting.
        known: All settings of the parser, with dots.
        given: The command's arguments.

    Returns:
        One or two sentences.
    """
    path, owner, known = complaint.path, complaint.class_path, list(known)
    if complaint.unknown is not None:
        path = (*path, complaint.unknown)
        while not owner and len(path) > 1 and not any(name.startswith(f"{'.'.join(path[:-1])}.") for name in known):
            path = path[:-1]  # the section itself is misspelt
        head = _head(path, given, None)
        settings = _settings_of(owner) if owner else []
        if owner and settings:
            return f"{head}: {owner.rpartition('.')[2]} has no such setting.{_meant(complaint.unknown, settings)}"
        if path[0] == "data" and len(path) == 2 and path[1] in _OF_SOURCES:
            return f"{head}: it is a setting of a source, as in `data.safety: {{path: ..., {path[1]}: ...}}`."
        return f"{head}: there is no such setting.{_meant_path(path, known)}"
    if not path:
        return ""
    if complaint.no_import:
        asked = owner or complaint.given or ""
        return f"{_head(path, given, asked)}: {_no_such_class(asked, complaint.reason)}"
    if complaint.expected:
        words = _all_words(complaint.expected)
        value = "" if complaint.given is None else f", got {_short(complaint.given)}"
        head = _head(path, given, complaint.given)
        return f"{head}: expected {_or(words)}{value}.{_deeper(path, complaint)}"
    if complaint.reason:
        return f"{_head(path, given, None)}: {complaint.reason}"
    return ""


def how_to_install(package: str) -> str:
    """Return the command that installs a package that is not needed by all."""
    return f'pip install "nspo-lightning[{_EXTRAS[package]}]"' if package in _EXTRAS else f"pip install {package}"


def near(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that was probably meant, None if none is near."""
    lower = {other.lower(): other for other in known}
    lower |= {alias: meant for alias, meant in _ALIASES.items() if meant in known and alias not in lower}
    found = get_close_matches(name.lower(), list(lower), n=1, cutoff=_NEAR)
    return lower[found[0]] if found else None


def _head(path: Sequence[str], given: Given, value: str | None) -> str:
    place = given.place(path, value)
    return f"`{'.'.join(path)}`" + (f" ({place})" if place else "")


def _names(parser: ArgumentParser) -> list[str]:
    return [name for name in parser.get_defaults(skip_validation=True).keys() if name]  # noqa: SIM118 - nested ones too


def _settings_of(class_path: str) -> list[str]:
    """Return the settings of a class; empty if they can't be told."""
    found = _import(class_path)
    if not inspect.isclass(found):
        return []
    if dataclasses.is_dataclass(found):
        return [field.name for field in dataclasses.fields(found) if field.init]
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(found, fail_untyped=False)
    except Exception:  # of whatever its signature holds; only a hint is lost
        return [name for name in inspect.signature(found).parameters if name not in {"args", "kwargs"}]
    top = [name for name in _names(parser) if "." not in name]
    return [name for name in top if not (name == "params" and found.__module__.startswith("torch"))]


def _import(class_path: str) -> Any:
    """Return what a class path names, None if there is no such thing."""
    module, _, name = class_path.rpartition(".")
    places = [module] if module else _PACKAGES
    for place in places:
        try:
            found = getattr(import_module(place), name, None)
        except Exception:  # a module of the user's may raise anything
            found = None
        if found is not None:
            return found
    return None


def _meant(name: str, known: Sequence[str]) -> str:
    if meant := near(name, known):
        return f" Did you mean `{meant}`?"
    listed = ", ".join(known[:_MOST_NAMES]) + (", ..." if len(known) > _MOST_NAMES else "")
    return f" It has: {listed}." if known else ""


def _meant_path(path: Sequence[str], known: Sequence[str]) -> str:
    """Guess among all settings: a neighbour of a like name, or one of that very name elsewhere."""
    *above, name = path
    prefix = ".".join([*above, ""])
    siblings = sorted({k.removeprefix(prefix).split(".")[0] for k in known if k.startswith(prefix)} - {"config"})
    elsewhere = [k for k in known if k.split(".")[-1] == name]
    if meant := near(name, siblings):
        return f" Did you mean `{prefix}{meant}`?"
    if elsewhere:
        return f" Did you mean `{min(elsewhere, key=len)}`?"
    listed = ", ".join(siblings[:_MOST_NAMES]) + (", ..." if len(siblings) > _MOST_NAMES else "")
    return f" There are: {listed}." if siblings else ""


def _unknown_options(arguments: Sequence[str], parser: ArgumentParser) -> str:
    names = _names(parser)
    options = [a.partition("=")[0] for a in arguments if a.startswith("-")]
    if not options:
        return f"`{arguments[0]}` stands behind no option. Options are written as `--name value`."
    told = []
    for option in options:
        path = option.lstrip("-").split(".")
        told.append(f"`{option}`: there is no such option.{_meant_path(path, names).replace('mean `', 'mean `--')}")
    return "\n".join(told)


def _missing(names: Sequence[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    there = " in the YAML of `-c`, or" if any("." in name for name in names) else ""
    return f"{listed}: expected a value, and found none. Give it{there} as `--{names[0]} VALUE`."


def _no_such_class(asked: str, reason: str) -> str:
    """Say that there is no such class, and which was meant."""
    module, _, name = asked.rpartition(".")
    if not module:
        better = _class_meant(name, _exported(_PACKAGES))
        return f"expected the path of a class, as `package.module.Class`, got '{asked}'.{better}"
    try:
        import_module(module)
    except Exception as error:  # a module of the user's may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not f"{module}.".startswith(f"{missing}."):
            return f"{module} needs the package `{missing}`, which is not installed: `{how_to_install(missing)}`."
        meant = near(module, [one for one in sys.modules if not one.rpartition(".")[2].startswith("_")])
        better = _class_meant(name, _exported([meant])) if meant else ""
        return f"there is no module '{module}' ({reason}).{better}"
    return f"{module} has no '{name}'.{_class_meant(name, _exported([module]))}"


def _exported(places: Sequence[str]) -> dict[str, str]:
    """Return name -> path of the classes of modules."""
    found: dict[str, str] = {}
    for place in places:
        try:
            found |= {name: f"{place}.{name}" for name in _classes(import_module(place))}
        except ImportError:
            continue
    return found


def _class_meant(name: str, exported: dict[str, str]) -> str:
    meant = near(name, list(exported))
    return f" Did you mean `{exported[meant]}`?" if meant else ""


def _classes(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or dir(module)
    return [name for name in names if not name.startswith("_") and callable(getattr(module, name, None))]


def _all_words(kinds: Sequence[str]) -> list[str]:
    """Say types in words, the choices of all of them together."""
    choices = [choice.strip(" '") for kind in kinds for choice in _choices(kind).split(",") if choice.strip()]
    words = ["one of " + ", ".join(dict.fromkeys(choices))] if choices else []
    return words + [_words(kind) for kind in kinds if not _choices(kind)]


def _words(kind: str) -> str:
    """Say a type, as jsonargparse writes it, in words."""
    if found := re.fullmatch(r"<class '([\w.]+)'>", kind):
        if found[1] in _PLAIN:
            return _PLAIN[found[1]]
        settings = _fields(found[1])
        return f"settings ({', '.join(settings)})" if settings else f"the class_path of a {found[1].split('.')[-1]}"
    lower = kind.lower()
    if lower.startswith(("list[", "typing.list[", "collections.abc.sequence[", "typing.sequence[", "sequence[")):
        return "a list"
    if lower.startswith(("dict[", "typing.dict[", "collections.abc.mapping[", "typing.mapping[", "mapping[")):
        return "a mapping of names to values"
    if "callable" in lower:
        return "the import path of a function or class"
    if "dot import path" in lower:
        return "the path of a class"
    return kind.replace("typing.", "")


def _choices(kind: str) -> str:
    found = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind)
    return found[1] if found else ""


def _fields(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return [field.name for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []


def _deeper(path: Sequence[str], complaint: Complaint) -> str:
    """Guess what was meant by a value: another choice, or a setting of the group of settings that got it."""
    choices = [choice.strip(" '") for kind in complaint.expected for choice in _choices(kind).split(",") if choice]
    if complaint.given and (meant := near(complaint.given, choices)):
        return f" Did you mean `{meant}`?"
    if re.fullmatch(r"[A-Za-z_]\w*", complaint.given or "") and any("<class '" in kind for kind in complaint.expected):
        return _class_meant(complaint.given or "", _exported(_PACKAGES))
    groups = [_fields(kind[8:-2]) for kind in complaint.expected if kind.startswith("<class '")]
    fields = next((group for group in groups if group), [])
    if not fields:
        return ""
    value = _short(complaint.given or "VALUE").strip("'") if len(fields) == 1 else "VALUE"
    return f" Did you mean `--{'.'.join(path)}.{fields[0]} {value}`?"


def _or(words: Sequence[str]) -> str:
    unique = list(dict.fromkeys(words))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _short(value: str) -> str:
    one_line = " ".join(value.split())
    return f"'{one_line if len(one_line) <= 80 else one_line[:77] + '...'}'"
