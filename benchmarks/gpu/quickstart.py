"""A few updates of the shipped quickstart, from the command line, on the device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from commands import checked, run
from device import Device
from record import Record
from workload import Scale


def measure(scale: Scale, device: Device, record: Record, folder: Path) -> dict[str, Any]:
    """Fit, and read what the run says of itself."""
    options = {
        "trainer.accelerator": "gpu" if device.is_cuda else "cpu",
        "trainer.devices": 1,
        "trainer.limit_train_batches": scale.updates,
        "trainer.val_check_interval": scale.updates,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
        "trainer.default_root_dir": folder,
    }
    command = [sys.executable, "-W", "ignore", "-m", "nspo_lightning", "fit", "-c", "quickstart"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--trainer.callbacks+=nspo_lightning.callbacks.RunReport", "--trainer.callbacks.evaluate=false"]
    done = checked(run(command, record.path.with_suffix(".output.txt"), record.left() - 2, folder))
    (summary,) = folder.rglob("summary.json")
    return done | {"summary": json.loads(summary.read_text())}


def main(scale: Scale, device: Device, record: Record, folder: Path, rest: bool, earlier: set[str]) -> None:
    """Run it."""
    record.attempt("fit", lambda: measure(scale, device, record, folder))
