"""``python -m nspo_lightning export``: a PEFT adapter, or a merged model, with a model card, out of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nspo_lightning.checkpoints import ADAPTER_CONFIG
from nspo_lightning.cli.help import PROG
from nspo_lightning.cli.parser import PlainParser
from nspo_lightning.cli.run_config import config_of_run, policy_settings, read_config
from nspo_lightning.export.merge import DTYPES
from nspo_lightning.export.trained import export_source, read_trained
from nspo_lightning.export.write import WARNING, export_adapter, export_merged

DESCRIPTION = """Write what a run has trained as a folder that PEFT, transformers and vLLM load.

  export --ckpt runs/nspo/checkpoints/last.ckpt --out my-adapter
  export --ckpt runs/nspo/checkpoints/last.ckpt --out my-model --merge --dtype bfloat16
"""
MARKERS = (ADAPTER_CONFIG, "config.json")


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    parsed = _parser().parse_args(arguments)
    if parsed.dtype is not None and not parsed.merge:
        _parser().error("--dtype is of the merged model: add --merge (an adapter keeps the float32 it was trained in)")
    checkpoint, out = parsed.ckpt, parsed.out
    check_out(out, checkpoint, overwrite=parsed.overwrite)
    content = read_trained(checkpoint)
    config_file = parsed.config or config_of_run(checkpoint)
    config = read_config(config_file)
    settings = policy_settings(config, config_file)
    source = export_source(checkpoint, content, config_file, config, settings, parsed.basis)
    lines = export_merged(source, out, parsed.dtype or "bfloat16") if parsed.merge else export_adapter(source, out)
    print("\n".join(line for line in lines if not line.startswith(WARNING)), flush=True)
    for line in lines:
        if line.startswith(WARNING):
            print(f"\n{line}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog=f"{PROG} export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint of a run (runs/NAME/checkpoints/...)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="config.yaml of the run, if not beside or above the checkpoint"
    )
    parser.add_argument("--basis", type=Path, metavar="FILE", help="basis file of the run, if it has moved")
    parser.add_argument("--merge", action="store_true", help="write a full model from the unquantised base")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged model (default: bfloat16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    return parser


def check_out(out: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything but an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"`--out` must be a folder, and {out} is a file. Give another one.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty. Give another `--out`, or replace what is there with `--overwrite`.")
    around = any(path.is_relative_to(out.resolve()) for path in (checkpoint.resolve(), Path.cwd()))
    if around or not any((out / marker).is_file() for marker in MARKERS):
        raise ValueError(
            f"{out} does not hold an earlier export, so `--overwrite` leaves it alone. Give another `--out`."
        )
