"""Run one part of the GPU benchmark in this process; started by run.sh.

    python benchmarks/gpu/run_part.py sampling-first --out OUT [--scale full|tiny] [--device cuda|cpu] [--seconds 65]

An error is written into the part's file as well; the exit code says that there was one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

from goals import measured, read
from record import Record
from workload import SCALES

MODULES = {
    "quickstart": "quickstart",
    "tests": "gpu_tests",
    "sampling": "sampling",
    "step": "step",
    "trl": "trl_step",
    "calibration": "calibration",
    "compare": "comparison",
    "profile": "profiles",
}

TERMINATED = 143  # as the shell counts an end by SIGTERM


def main() -> int:
    """Run the part; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that commands in progress are ended too
    kind, _, half = arguments.part.partition("-")
    scale = SCALES[arguments.scale]
    about = {"scale": arguments.scale, "settings": asdict(scale), "device": {"kind": arguments.device}}
    record = Record(arguments.out, arguments.part, about, arguments.seconds)
    try:
        from device import Device

        device = Device(arguments.device)
        record.content["device"] |= device.about()
        record.write()
        with tempfile.TemporaryDirectory() as folder:
            part = importlib.import_module(MODULES[kind])
            earlier = set(measured(read(arguments.out), kind)) if half == "rest" else set()
            part.main(scale, device, record, Path(folder), half == "rest", earlier)
    except Exception as error:
        traceback.print_exc()
        record.end("failed", error=f"{type(error).__name__}: {error}"[:4000])
        return 1
    if record.content["status"] == "running":
        record.end("done")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
