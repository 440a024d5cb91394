"""Two DDP processes over gloo and one process: the same global batches give the same run, from calibration to test."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nspo_lightning.nullspace import load_calibration

AGREE = 1e-6
"""Of gradients (relative to the largest) and of the final adapter: float32 sums in another order."""
pytestmark = pytest.mark.timeout(1800)


def commands(job, processes):
    """The whole job; a fit that accumulates, with batches without signal or with it on one rank; and a guarded one.

    The guarded one's rate is far too high, so that its first updates exceed the budget and are taken back.
    """
    window = ["--trainer.accumulate_grad_batches", "2", "--model.objective.loss_type", "dapo"]
    window += ["--model.scale_rewards", "batch", "--model.reward.init_args.path", "probes.now_and_then"]
    guard = ["--trainer.callbacks+=nspo_lightning.callbacks.CapabilityGuard", "--trainer.callbacks.every_n_updates=1"]
    guard += ["--trainer.callbacks.max_kl=3e-4", "--model.optimizer.init_args.lr=0.01"]
    trained = ["--ckpt_path", f"runs/fit-{processes}/checkpoints/last.ckpt"]
    begun = ["--model.prefixes.share", "0.5", "--model.prefixes.max_tokens", "4"]
    return [
        job.command("calibrate", processes, "--out", f"basis-{processes}.safetensors"),
        job.command("fit", processes, "--name", f"fit-{processes}"),
        job.command("validate", processes, "--name", f"validate-{processes}", *trained),
        job.command("test", processes, "--name", f"test-{processes}", *trained),
        job.command("predict", processes, "--name", f"predict-{processes}", *trained),
        job.command("fit", processes, "--name", f"window-{processes}", *window),
        job.command("fit", processes, "--name", f"guarded-{processes}", *guard),
        job.command("fit", processes, "--name", f"begun-{processes}", *begun, "--data.val_attacks", "[prefill_3]"),
        job.command("test", processes, "--name", f"attacked-{processes}", *trained, "--attacks", "prefill_3"),
    ]


@pytest.fixture(scope="module")
def runs(job):
    """The job's folder, after it ran on two processes and on one."""
    for processes in (2, 1):
        job.run(commands(job, processes), f"on-{processes}")
    return job.folder


def weights(folder, name, rank=0):
    return torch.load(folder / "runs" / name / f"weights-{rank}.pt")


def difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "training/step_time"]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def jsonl(folder):
    files = sorted(folder.glob("test_completions*.jsonl"), key=lambda file: len(file.name))  # the first rank's first
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_gradients_are_those_of_one_process(runs):
    one, two, other = (torch.load(runs / f"gradients-{n}.pt") for n in ("1-0", "2-0", "2-1"))
    assert difference(two, other) == 0
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert largest > 0
    assert difference(one, two) <= AGREE * largest


@pytest.mark.parametrize("name", ["fit", "window", "guarded", "begun"])
def test_final_adapter_is_that_of_one_process(runs, name):
    one, two = weights(runs, f"{name}-1"), weights(runs, f"{name}-2")
    assert difference(two, weights(runs, f"{name}-2", rank=1)) == 0
    assert max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key) > 100 * AGREE
    assert difference(one, two) <= AGREE


def test_groups_stay_on_one_rank_and_every_prompt_is_trained_on_once(runs):
    steps = [(runs / "runs" / "fit-2" / f"prompts-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    alone = (runs / "runs" / "fit-1" / "prompts-0.txt").read_text().splitlines()
    assert len(steps[0]) == len(steps[1]) == len(alone) == 4
    trained: Counter[str] = Counter()
    for together, *ranks in zip(alone, *steps, strict=True):
        rows = [line.split("\t") for line in ranks]
        for row in rows:
            assert row == [prompt for prompt in row[::4] for _ in range(4)], "a group is four completions in a row"
        assert not set(rows[0]) & set(rows[1])
        assert Counter(rows[0] + rows[1]) == Counter(together.split("\t"))
        trained.update(rows[0][::4] + rows[1][::4])
    assert len(trained) == 15
    assert set(trained.values()) == {1}


@pytest.mark.parametrize("name", ["fit", "validate", "window", "guarded", "begun"])
def test_metrics_are_those_of_all_ranks(runs, name):
    one, two = scalars(runs / "runs" / f"{name}-1"), scalars(runs / "runs" / f"{name}-2")
    assert one.keys() == two.keys()
    assert "safety/answered_rate" in one
    for tag, values in one.items():
        if tag not in {"nullspace/leak_max", "result/leak"}:  # rounding itself, around 1e-8
            nearly = 1e-6 if tag.endswith("nll_change") else 1e-7  # the difference of two larger numbers
            assert two[tag] == pytest.approx(values, rel=2e-5, abs=nearly), tag
    if name == "fit":
        training = {
            f"training/{tag}" for tag in ("num_tokens", "completions/min_length", "entropy", "loss", "grad_norm")
        }
        assert {"reward_std", *training} <= one.keys()


def test_the_guard_sees_the_same_text_and_acts_alike(runs):
    one, two = scalars(runs / "runs" / "guarded-1"), scalars(runs / "runs" / "guarded-2")
    assert 1 <= max(one["guard/rescues"]) < 4, "some updates stand and some are taken back"
    assert two["guard/rescues"] == one["guard/rescues"]


def test_test_rows_are_neither_doubled_nor_dropped_and_answered_alike(runs):
    (alone,), ranks = jsonl(runs / "runs" / "test-1"), jsonl(runs / "runs" / "test-2")
    assert [len(rows) for rows in ranks] == [8, 6]  # 7 and 7: 2 + 2 on one rank, 2 + 1 on the other
    together = [row for rows in ranks for row in rows]
    key = json.dumps
    assert Counter(map(key, together)) == Counter(map(key, alone))
    assert len({row["prompt"] for row in together}) == 14
    one, two = (json.loads((runs / "runs" / f"test-{n}" / "test.json").read_text()) for n in (1, 2))
    assert two["rates"] == one["rates"]
    assert two["rates"]["policy"]["safety/answered_rate"]["of"] == 7
    assert two["text"] == pytest.approx(one["text"], rel=1e-5, abs=1e-7)


def test_begun_answers_are_begun_alike_and_counted_over_ranks(runs):
    one, two = (json.loads((runs / "runs" / f"attacked-{n}" / "test.json").read_text())["rates"] for n in (1, 2))
    assert two == one
    rate = one["policy"]["attack/prefill_3/answered_rate"]
    assert 4 <= rate["of"] <= 7, "rows whose base answers are too short are left out"
    (alone,), ranks = jsonl(runs / "runs" / "attacked-1"), jsonl(runs / "runs" / "attacked-2")
    key = json.dumps
    assert Counter(map(key, (row for rows in ranks for row in rows))) == Counter(map(key, alone))
    assert any(row.get("prefix") for row in alone)
    assert "prefix/share" in {tag.removeprefix("training/") for tag in scalars(runs / "runs" / "begun-2")}


def test_predictions_are_those_of_one_process(runs):
    one, two = (
        Counter(line for file in (runs / "runs" / f"predict-{n}").glob("predictions*.jsonl") for line in file.open())
        for n in (1, 2)
    )
    assert sum(one.values()) == 14
    assert one == two


def test_calibration_counts_every_token_once(runs):
    one, two = (load_calibration(runs / f"basis-{n}.safetensors") for n in (1, 2))
    assert two.domain_tokens == one.domain_tokens
    for name, basis in one.bases.items():
        largest = float(basis.values.max())
        assert float((basis.values - two.bases[name].values).abs().max()) <= 1e-6 * largest
