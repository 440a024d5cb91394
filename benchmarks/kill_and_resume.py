"""Kill runs with SIGKILL at random moments, resume them, and compare the result with an uninterrupted run, bit by bit.

    python benchmarks/kill_and_resume.py --times 20

Each trial is one run of ``fit`` (or ``warmup``) in its own folder, killed in the phase that is next on the list
(calibration, rollout, between two updates of one rollout, while a checkpoint is written, validation), at a random
occurrence of that phase and a random time into it; then the same command again with ``--ckpt_path last-if-any``.
Compared are the final adapter, and of the last checkpoint the optimizer, scheduler, counters, random generators and the
callbacks' states.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # what the tests share

from kill_runs import PHASES, differences, kill_in, occurrences, result, start, wait, warmup_options, write_job


def main() -> None:
    """Run the trials and print one line each.

    Raises:
        SystemExit: With 1 if a resumed run differs.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="Kills.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments.")
    parser.add_argument("--accumulate", type=int, default=1, help="Batches an update.")
    parser.add_argument("--dynamic", action="store_true", help="Replace groups without a signal.")
    parser.add_argument("--guided", action="store_true", help="Draw a part of each group under a safety prompt.")
    parser.add_argument("--warmup", action="store_true", help="Kill `warmup` instead of `fit`.")
    parser.add_argument("--folder", type=Path, default=None, help="Keep the runs there.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    root = (options.folder or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))).resolve()
    job: dict[str, Any] = {"dynamic": options.dynamic, "guided": options.guided}
    command, name, arguments = ("warmup", "job-warmup", warmup_options()) if options.warmup else ("fit", "job", [])
    write_job(root / "whole", options.accumulate, **job)
    began = time.monotonic()
    ends_with = wait(start(root / "whole", *arguments, command=command))
    if ends_with and not options.warmup:  # one that does not come to what is asked for is an error, behind its end
        sys.exit(f"The uninterrupted run ended with {ends_with}; see {root / 'whole' / 'output.log'}.")
    print(f"uninterrupted run: {time.monotonic() - began:.1f} s, in {root}", flush=True)
    expected, counts, failed = result(root / "whole", name), occurrences(root / "whole"), 0
    hits: Counter[str] = Counter()
    for trial in range(options.times):
        phase, folder = PHASES[trial % len(PHASES)], root / f"kill{trial}"
        write_job(folder, options.accumulate, **job)
        child = start(folder, *arguments, command=command)
        delay_s = chance.uniform(0, 0.015 if phase == "checkpoint" else 0.15)
        hit = kill_in(child, folder, phase, chance.randint(1, counts[phase]), delay_s)
        wait(child)
        hits[hit] += 1
        last = folder / "runs" / name / "checkpoints" / "last.ckpt"
        place = f"update {torch.load(last, weights_only=True)['global_step']}" if last.exists() else "start"
        left = len(list(folder.rglob(".*.partial")))
        code = wait(start(folder, *arguments, "--ckpt_path", "last-if-any", command=command))
        different = [f"exit code {code}"] if code != ends_with else differences(expected, result(folder, name))
        different += [f"left over: {file.name}" for file in folder.rglob(".*ckpt*.partial")]
        failed += bool(different)
        print(
            f"kill {trial + 1:>2}: aimed at {phase:<15} hit {hit or 'nothing':<15} from {place:<10} "
            f"{left} half-written files, " + (f"DIFFERS: {different[:4]}" if different else "bitwise the same"),
            flush=True,
        )
    print(f"{options.times - failed} of {options.times} are bitwise the uninterrupted run; hit: {dict(hits)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
