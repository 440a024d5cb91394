"""The parsers of the commands' arguments: none repeats a key, neither in a message nor in `--print_config`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from nspo_lightning.cli.explain import explained, near
from nspo_lightning.cli.given import given
from nspo_lightning.keys import check_no_key, mask_keys


def usage(program: str) -> str:
    """Return how a command is called, and where its options are listed, in two lines."""
    program = program.replace(" [options]", "")
    return f"usage: {program} [--OPTION VALUE ...]\nAll options: {program} --help=all\n"


class PlainParser(argparse.ArgumentParser):
    """The standard library's, for commands with few options."""

    _given: Sequence[str] = ()

    @override
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    @override
    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        names = [argument.partition("=")[0] for argument in self._given if argument.startswith("--")]
        # A required option that is misspelt is missing, too.
        told = message.startswith(("unrecognized arguments", "the following arguments are required"))
        unknown = [name for name in names if told and not any(option.startswith(name) for option in known)]
        meant = [near(name, known) for name in unknown]
        better = f". Did you mean {', '.join(f'`{option}`' for option in meant if option)}?" if any(meant) else ""
        self.exit(2, f"{usage(self.prog)}error: {mask_keys(message)}{better}\n")


class KeylessParser(jsonargparse.ArgumentParser):  # type: ignore[misc]
    """One whose configuration holds no key, or is refused; what it refuses, it says in one or two lines."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(mask_keys(message), ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        told = explained(message, parser, given(), next(iter(given().arguments), ""))
        self.exit(2, f"{usage(parser.prog)}error: {mask_keys(told)}\n")
        raise AssertionError  # it has exited

    @override
    def dump(self, cfg: jsonargparse.Namespace, **kwargs: Any) -> str:
        check_no_key("", cfg.as_dict())
        text: str = super().dump(cfg, **kwargs)
        return text


class Parser(KeylessParser, LightningArgumentParser):
    """Takes a path among data or calibration settings as what it is, not as a file with settings to be read."""

    @override
    def format_usage(self) -> str:
        return usage(self.prog)

    @override
    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        if nested_key not in {"data", "nullspace"}:
            return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)
        if issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        added: list[str] = self.add_class_arguments(lightning_class, nested_key, fail_untyped=False)
        return added

    @override
    def add_method_arguments(self, class_type: type, method_name: str, *args: Any, **kwargs: Any) -> list[str]:
        # The arguments of these jobs can't be groups of their names: those are the datamodule's and the settings'.
        if method_name in {"data", "warmup", "tamper"}:
            kwargs["as_group"] = False
        added: list[str] = super().add_method_arguments(class_type, method_name, *args, **kwargs)
        if method_name == "test":
            self.set_defaults(verbose=False)  # Lightning's table says again, in part, what `TestReport` shows
        return added
