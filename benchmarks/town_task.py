"""Write the embedded world's general questions as a task of lm-evaluation-harness: `evaluate` without a download.

python benchmarks/town_task.py --out tasks
python -m nspo_lightning evaluate -c quickstart --ckpt_path best --tasks town --include_path tasks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from nspo_lightning.toy.world import rows


def main() -> None:
    """Write `town.yaml` and its questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="folder of the task")
    parser.add_argument("--per_skill", type=int, default=40, help="questions of each skill, at most")
    arguments = parser.parse_args()
    questions = [row for row in rows("general", "test", arguments.per_skill) if row.get("answer")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out.resolve() / "town.jsonl"
    file.write_text("".join(json.dumps({key: row[key] for key in ("prompt", "answer")}) + "\n" for row in questions))
    task = {
        "task": "town",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 32},
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (arguments.out / "town.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    print(f"{len(questions)} questions written to {arguments.out}")


if __name__ == "__main__":
    main()
