"""The `completion` command: a script that completes subcommands, the options of their first screens, shipped configs.

jsonargparse's own script (`ArgumentParser.get_completion_script`) does not do: it needs the parsers of all jobs, and it
completes files after `--config`, not the names of shipped configurations.
"""

from __future__ import annotations

import argparse

from nspo_lightning.cli.help import JOBS, OPTIONS, PROG, TOOLS
from nspo_lightning.cli.shipped import shipped_configs

SHELLS = ("bash", "zsh", "tcsh")


def print_completion(arguments: list[str]) -> None:
    """Print a completion script: `completion bash`."""
    parser = argparse.ArgumentParser(prog=f"{PROG} completion", description="Print a completion script to source.")
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(arguments).shell
    try:
        import shtab
    except ImportError as error:
        raise ValueError(
            "`completion` needs shtab: `pip install shtab`, or the extra `nspo-lightning[cli]`."
        ) from error
    print(shtab.complete(_completion_parser(), shell=shell))


def _completion_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nspo-lightning")
    commands = parser.add_subparsers()
    for name, line in {**JOBS, **TOOLS}.items():
        sub = commands.add_parser(name, help=line)
        for option, meaning in OPTIONS.get(name, {}).items():
            names = ("-c", option) if option == "--config" else (option,)
            sub.add_argument(*names, help=meaning, choices=list(shipped_configs()) if option == "--config" else None)
        if name == "completion":
            sub.add_argument("shell", choices=SHELLS)
    return parser
