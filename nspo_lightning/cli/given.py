"""What a command was given, and where each setting stands: on the command line, or in which line of which file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A line of a configuration file, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


Setting = tuple[Place, Keys, "str | None"]
"""Where it stands, its keys from the top without `init_args`, its value if that is one word or number."""


@dataclass(frozen=True)
class Given:
    """The arguments of a command.

    Attributes:
        arguments: As the parsers get them.
        folder: Where it was called: parsers change the folder while they read a file.
    """

    arguments: Sequence[str] = ()
    folder: Path = field(default_factory=Path.cwd)

    @cached_property
    def files(self) -> list[str]:
        """The configuration files, those first that win."""
        found = []
        for before, argument in zip(["", *self.arguments], self.arguments, strict=False):
            if before in {"-c", "--config"}:
                found.append(argument)
            elif argument.startswith("--config="):
                found.append(argument.partition("=")[2])
        return found[::-1]

    def on_command_line(self, path: Sequence[str]) -> bool:
        """Whether an option names this setting, or one above or below it."""
        asked = ".".join(path)
        names = [a[2:].partition("=")[0].rstrip("+").replace(".init_args", "") for a in self.arguments if a[:2] == "--"]
        return any(f"{asked}.".startswith(f"{n}.") or f"{n}.".startswith(f"{asked}.") for n in names)

    def place(self, path: Sequence[str], value: str | None = None) -> Place | None:
        """Return where a setting stands in the files; None if it stands in none, or on the command line.

        Args:
            path: Its keys from the top, without `init_args`.
            value: Its value, if that tells it from others of the same keys, as in a list.
        """
        if self.on_command_line(path):
            return None
        found = [(place, at, said) for place, at, said in self._settings() if at == tuple(path)]
        for place, _, said in found:
            if value is not None and said == value:
                return place
        return found[0][0] if found else None

    def place_of_name(self, name: str) -> Place | None:
        """Return the one place where a setting stands that is called so, as `group_size` or `objective.beta`."""
        path = name.split(".")
        if any(a[:2] == "--" and f".{a[2:].partition('=')[0]}".endswith(f".{name}") for a in self.arguments):
            return None
        found = {place for place, at, _ in self._settings() if list(at[-len(path) :]) == path}
        return next(iter(found)) if len(found) == 1 else None

    def broken_file(self) -> str | None:
        """Say which file is no YAML, or holds no settings, and why."""
        for file in self.files:
            try:
                node = yaml.compose((self.folder / file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            except yaml.MarkedYAMLError as error:
                mark = error.problem_mark or error.context_mark
                where = f"{file}, line {mark.line + 1}" if mark else file
                return f"{where}: this is no YAML ({error.problem or error.context})."
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                return f"{file} can't be read as YAML: {str(error).splitlines()[0]}."
            if not isinstance(node, yaml.MappingNode):
                kind = {yaml.SequenceNode: "a list", yaml.ScalarNode: "one value"}.get(type(node), "nothing")
                return f"{file} holds {kind}: expected settings, as `name: value`."
        return None

    def _settings(self) -> Iterator[Setting]:
        """Yield place, path and value of all settings in all files."""
        for file in self.files:
            try:
                node = yaml.compose((self.folder / file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            except (yaml.YAMLError, OSError, UnicodeDecodeError):
                continue
            yield from _walk(node, file, ())


def _walk(node: yaml.Node | None, file: str, path: Keys) -> Iterator[Setting]:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            if isinstance(child, yaml.ScalarNode):
                yield Place(file, child.start_mark.line + 1), path, child.value
            yield from _walk(child, file, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, child in node.value:
        name = str(key.value)
        own = path if name in {"init_args", "class_path"} else (*path, name)
        if name != "init_args":
            value = child.value if isinstance(child, yaml.ScalarNode) else None
            yield Place(file, key.start_mark.line + 1), own, value
        yield from _walk(child, file, own)


_GIVEN: ContextVar[Given | None] = ContextVar("given", default=None)


def remember(arguments: Sequence[str]) -> None:
    """Note what the command that runs was given."""
    _GIVEN.set(Given(tuple(arguments)))


def given() -> Given:
    """Return what the command that runs was given."""
    return _GIVEN.get() or Given()
