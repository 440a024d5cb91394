"""Arguments as the parsers take them, shipped configurations by their name among them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

HELP_ALL = ("--help=all", "--help_all", "--help-all")


class UnknownConfigError(ValueError):
    """A configuration that is neither a file nor shipped."""


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return arguments with shipped configs as paths, and `--help=all` as the parsers' own help."""
    result: list[str] = []
    named = arguments[0] != "export"  # its --config is always a run's file
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if argument in HELP_ALL:
            result.append("--help")
        elif named and before in {"-c", "--config"}:
            result.append(find_config(argument))
        elif named and equals and option == "--config":
            result.append(f"{option}={find_config(value)}")
        else:
            result.append(argument)
    return result


def shipped_configs() -> dict[str, str]:
    """Return name -> path of the configurations that come with the package, as `quickstart` or `strategies/ddp`."""
    folder = Path(str(files("nspo_lightning.configs")))
    found = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("strategies/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in found}


def find_config(name: str) -> str:
    """Return the path that `--config` means: a file, or else a shipped configuration, with or without its ending."""
    if Path(name).exists() or any(sign in name for sign in "{:\n"):
        return name
    shipped = shipped_configs()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    if name != Path(name).name:
        return name
    raise UnknownConfigError(
        f"`--config {name}`: there is no such file here, and no shipped configuration of that name. Shipped ones: "
        f"{', '.join(shipped)}. Give one of them, or the path of a file."
    )
