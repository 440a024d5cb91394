"""Arguments as the parsers take them, shipped configurations by their name among them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

HELP_ALL = ("--help=all", "--help_all", "--help-all")


_PREVIEW = "--preview"
_PROMPTS = 64


class WrongOptionsError(ValueError):
    """Options that do not go together."""


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


def preview_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of the `preview` job, if that is what `judge --preview N` asks for; else those given.

    Raises:
        WrongOptionsError: If a file is named too, or N is no number of prompts.

    Example:
        >>> preview_arguments(["judge", "-c", "my.yaml", "--preview", "8"])
        ['preview', '-c', 'my.yaml', '--prompts', '8']
    """
    words = list(arguments)
    if not words or words[0] != "judge" or not any(word.partition("=")[0] == _PREVIEW for word in words):
        return words
    if any(word.partition("=")[0] == "--input" for word in words):
        raise WrongOptionsError(
            f"`judge` scores a file (`--input`) or previews a training (`{_PREVIEW}`). Give one of the two."
        )
    changed = ["preview"]
    rest = iter(enumerate(words[1:], start=1))
    for place, word in rest:
        name, equals, value = word.partition("=")
        if name != _PREVIEW:
            changed.append(word)
            continue
        following = words[place + 1] if place + 1 < len(words) else "-"
        if not equals and (not following.startswith("-") or following[1:].isdecimal()):
            value = next(rest)[1]
        changed += ["--prompts", _whole(value or str(_PROMPTS))]
    return changed


def _whole(value: str) -> str:
    if not value.isdecimal() or int(value) < 1:
        raise WrongOptionsError(f"`{_PREVIEW}` must be a whole number of prompts, 1 or more, got {value!a}.")
    return value
