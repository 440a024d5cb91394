"""Run several subcommands in one process (each rank of a job runs this same script): arguments as JSON lists."""

from __future__ import annotations

import json
import sys

import torch


def main() -> None:
    """Run them one after another; the first that fails ends the script."""
    torch.set_num_threads(1)
    from nspo_lightning.cli.app import main as cli

    for command in json.loads(sys.argv[1]):
        cli(command)


if __name__ == "__main__":
    main()
