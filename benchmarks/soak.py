"""Train long and watch what the process holds: memory, file handles, threads.

    python benchmarks/soak.py --updates 500

The run is the quickstart's (embedded policy in NF4, 12 prompts of 8 completions), with a validation every 100 updates
on one batch and no measurement before and after. Printed are the slopes over the second half, where buffers and caches
have their size: of a leak that matters, 500 updates show megabytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import yaml
from lightning.pytorch.callbacks import Callback

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Held:
    """What the process holds after an update.

    Attributes:
        update: The batch's number.
        memory_mb: Resident memory.
        handles: Open files, sockets and pipes.
        threads: Threads, torch's and the logger's among them.
        tensors: Tensors that Python knows of, -1 if they were not counted.
    """

    update: int
    memory_mb: float
    handles: int
    threads: int
    tensors: int = -1


def held(update: int, count_tensors: bool = False) -> Held:
    """Look at this process (Linux).

    Args:
        update: The batch's number.
        count_tensors: Also count tensors, which walks over all objects.

    Returns:
        What it holds.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = (
        sum(type(thing).__name__ in {"Tensor", "Parameter"} for thing in gc.get_objects()) if count_tensors else -1
    )
    return Held(
        update,
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        tensors,
    )


class Watch(Callback):
    """Look after each batch; the class keeps it, so that who runs the command line finds it."""

    seen: ClassVar[list[Held]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look."""
        update = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.seen.append(held(update, count_tensors=update % 10 == 0))


def slope(seen: list[Held], name: str) -> float:
    """Fit a line through the second half.

    Args:
        seen: All updates.
        name: Of the attribute.

    Returns:
        Its growth an update.
    """
    half = [one for one in seen[len(seen) // 2 :] if getattr(one, name) >= 0]
    return float(np.polyfit([one.update for one in half], [getattr(one, name) for one in half], 1)[0])


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
        {"class_path": "soak.Watch"},
        {"class_path": "nspo_lightning.callbacks.RunReport", "init_args": {"evaluate": False}},
    ]
    config["data"] |= {"eval_batch_size": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def main() -> None:
    """Run and print the slopes."""
    from nspo_lightning.cli import app as cli

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--json", type=Path, default=None, help="Write every update's figures there.")
    options = parser.parse_args()
    out = None if options.json is None else options.json.resolve()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        os.chdir(folder)
        write_config(Path(folder), options.updates)
        cli.main(["fit", "-c", "config.yaml"])
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
    sys.modules["soak"] = sys.modules["__main__"]
    main()
