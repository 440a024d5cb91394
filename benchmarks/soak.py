"""Train long and watch what the process holds: memory, file handles, threads.

    python benchmarks/soak.py --updates 500

The run is the quickstart's (embedded policy in NF4, 12 prompts of 8 completions), with a validation every 100 updates
on one batch and no measurement before and after. Printed are the slopes over the second half, where buffers and caches
have their size: of a leak that matters, 500 updates show megabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # what the tests share

from held import Watch, slope

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def write_config(folder: Path, updates: int) -> None:
    """Write the quickstart with little evaluation.

    Args:
        folder: Where to.
        updates: How many.
    """
    config = yaml.safe_load(QUICKSTART.read_text())
    config["name"] = "soak"
    config["trainer"] |= {
        "max_epochs": -1,
        "max_steps": updates,
        "limit_train_batches": 100,
        "limit_val_batches": 1,
        "val_check_interval": 100,
        "enable_progress_bar": False,
    }
    config["trainer"]["callbacks"] = [
        {"class_path": "held.Watch"},
        {"class_path": "nspo_lightning.callbacks.RunReport", "init_args": {"evaluate": False}},
    ]
    config["data"] |= {"eval_batch_size": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def main() -> None:
    """Run and print the slopes."""
    from nspo_lightning.cli.app import main as run

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--json", type=Path, default=None, help="Write every update's figures there.")
    options = parser.parse_args()
    out = None if options.json is None else options.json.resolve()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        os.chdir(folder)
        write_config(Path(folder), options.updates)
        run(["fit", "-c", "config.yaml"])
        os.chdir("/")
    seen = Watch.seen
    first, last = seen[len(seen) // 2], seen[-1]
    print(f"{len(seen)} updates; from update {first.update} to {last.update}:")
    for name, unit in (("memory_mb", "MB"), ("handles", ""), ("threads", ""), ("tensors", "")):
        values = [getattr(one, name) for one in seen if getattr(one, name) >= 0]
        half = values[len(values) // 2 :]
        growth = slope(seen, name)
        print(f"  {name:<10} {half[0]:>9.1f} -> {half[-1]:>9.1f} {unit:<2} {growth:+.5f} {unit} an update")
    if out is not None:
        out.write_text(json.dumps([asdict(one) for one in seen]) + "\n")


if __name__ == "__main__":
    main()
