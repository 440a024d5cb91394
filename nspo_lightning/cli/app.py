"""The entry of the command line: help, completion, the jobs of LightningCLI, and the other subcommands."""

from __future__ import annotations

import sys
from importlib import import_module

from nspo_lightning.cli.completion import print_completion
from nspo_lightning.cli.errors import exit_codes
from nspo_lightning.cli.given import remember
from nspo_lightning.cli.help import help_text, overview, unknown_subcommand
from nspo_lightning.cli.jobs import CLI, cli_arguments, silence_noise
from nspo_lightning.cli.shipped import prepared, preview_arguments
from nspo_lightning.keys import mask_keys

COMMANDS = {name: f"nspo_lightning.cli.{name}" for name in ("judge", "compare", "evaluate", "export", "report")}
"""Subcommands beside LightningCLI's: their modules have a `main(arguments)` and are imported on use."""


def main(args: list[str] | None = None) -> None:
    """Run the command line (by default the process's own arguments): exit code 0, 1 (failed), 2 (usage)."""
    silence_noise()
    arguments = list(sys.argv[1:] if args is None else args)
    if (text := help_text(arguments)) is not None:
        print(text)
        return
    if not arguments:
        print(f"{overview()}\n\nerror: expected a subcommand, got none.", file=sys.stderr)
        sys.exit(2)
    if (told := unknown_subcommand(arguments)) is not None:
        print(f"error: {mask_keys(told)}", file=sys.stderr)
        sys.exit(2)
    with exit_codes():
        arguments = preview_arguments(prepared(arguments))
        remember(arguments)
        if arguments[0] == "completion":
            print_completion(arguments[1:])
        elif arguments[0] in COMMANDS:
            import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        elif args is None:
            sys.argv[1:] = arguments  # where LightningCLI looks, and warns if it is told something else
            CLI(**cli_arguments(arguments[0]))
        else:
            CLI(**cli_arguments(arguments[0]), args=arguments)
