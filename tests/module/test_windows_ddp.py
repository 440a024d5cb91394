"""Windows under DDP on two gloo processes: the gradients are those of one process with all prompts of both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from known_rollouts import Prompt, gradients, mean_of, random_epoch, still_policy
from paths import job_environment
from torch import Tensor
from windows_ddp_job import SEEDS, dealt, guided, warmed_up

from nspo_lightning.grpo import LossType


@pytest.fixture(scope="module")
def ranks(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("windows_ddp_job.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_llama), str(folder)],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
        env=job_environment(script.parent),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def expected(policy: Any, folder: Path, loss_type: LossType, windows: list[list[list[Any]]]) -> list[dict[str, Tensor]]:
    """The gradient of each window, {} for none; a window holds the batches of both ranks."""
    if loss_type != "bnpo":
        whole = gradients(policy, folder, [[one for batch in window for one in batch] for window in windows])
        return [whole.get(i, {}) for i in range(len(windows))]
    alone = gradients(policy, folder, [batch for window in windows for batch in window])
    numbers = iter(range(1000))
    parts = [[alone.get(next(numbers)) for _ in window] for window in windows]
    return [mean_of([part for part in some if part], len(some)) if any(some) else {} for some in parts]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_the_gradient_of_a_window_is_that_of_one_process(
    ranks: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path, loss_type: LossType
) -> None:
    policy = still_policy(tiny_llama, loss_type)
    for seed in SEEDS:
        batches, accumulate = random_epoch(seed)
        together = list(zip(dealt(batches, 0), dealt(batches, 1), strict=True))
        starts = range(0, len(together), accumulate)
        windows = [[part for both in together[s : s + accumulate] for part in both] for s in starts]
        ends = [min(start + accumulate, len(together)) - 1 for start in starts]
        for rank in ranks:
            found = rank["windows"][f"{loss_type} {seed}"]
            for end, values in zip(ends, expected(policy, tmp_path, loss_type, windows), strict=True):
                assert found.get(end, {}).keys() == values.keys()
                scale = max((float(value.abs().max()) for value in values.values()), default=0.0)
                for name, value in values.items():
                    torch.testing.assert_close(found[end][name], value, rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.timeout(300)
def test_a_part_that_is_empty_on_one_rank_stops_nobody(ranks: list[dict[str, Any]]) -> None:
    one, two = (rank["parts"] for rank in ranks)
    assert one["rollouts"] == two["rollouts"] == 1
    assert one["steps"] == two["steps"] == 6
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    assert all(bool(value.isfinite().all()) for value in one["weights"].values())


@pytest.mark.timeout(300)
def test_groups_are_replaced_on_all_ranks_together(
    ranks: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    one, two = (rank["replaced"] for rank in ranks)
    # 0 1, 2 3, 4 5: one of rank 1 and one of rank 1 again, which has both. 6 7, 8 9. 10 to 17 in four rounds.
    assert one["prompts"] == two["prompts"] == [6, 4, 8]
    learnt = [[3, 5], [6, 9], [15, 16]]  # of the first two, both are rank 1's: rank 0 has nothing that counts
    batches = [[Prompt(i) for i in batch] for batch in learnt]
    whole = gradients(still_policy(tiny_llama, "grpo"), tmp_path, batches)
    for found in (one["gradients"], two["gradients"]):
        assert found.keys() == whole.keys()
        for number, values in whole.items():
            for name, value in values.items():
                torch.testing.assert_close(found[number][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.timeout(300)
def test_a_warm_start_is_that_of_one_process(ranks: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path) -> None:
    alone = warmed_up(tiny_llama, tmp_path, 4)
    assert alone["kl"][1] > 0.0
    for rank in ranks:
        assert rank["warm"]["kl"] == pytest.approx(alone["kl"], rel=1e-4, abs=1e-7)
        assert rank["warm"]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        for name, value in rank["warm"]["weights"].items():
            torch.testing.assert_close(value, alone["weights"][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.timeout(300)
def test_a_guided_update_is_that_of_one_process(ranks: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path) -> None:
    alone = guided(tiny_llama, tmp_path, 4)
    assert len(alone["steps"]) == 6
    texts: list[Any] = []
    for found in (rank["guided"] for rank in ranks):
        assert [row["guided"] for row in found["rows"]] == [False, False, False, True] * 2
        texts += [(row["prompt"], row["guided"], row["completion"]) for row in found["rows"]]
        for number, values in alone["gradients"].items():
            scale = max(float(value.abs().max()) for value in values.values())
            for name, value in values.items():
                torch.testing.assert_close(found["gradients"][number][name], value, rtol=1e-4, atol=1e-5 * scale)
        for name in ("guided/importance_ratio", "guided/ratio_small", "guided/reward", "reward", "loss"):
            together = [step[name] for step in found["steps"]]
            assert together == pytest.approx([step[name] for step in alone["steps"]], rel=1e-4, abs=1e-6), name
    assert sorted(texts) == sorted((row["prompt"], row["guided"], row["completion"]) for row in alone["rows"])
    assert abs(alone["steps"][0]["guided/importance_ratio"] - 1) > 1e-3, "another prompt is another distribution"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["warm", "both"])
def test_ranks_go_on_from_a_checkpoint_to_the_same_bits(ranks: list[dict[str, Any]], name: str) -> None:
    """A warm start; and guided groups, those without a signal replaced, between two updates of a rollout."""
    for rank in ranks:
        whole, resumed = rank[name], rank[f"{name}, resumed"]
        for key, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][key], value), key
            assert torch.equal(ranks[0][name]["weights"][key], value), key
    assert name == "warm" or max(step["dynamic/rounds"] for step in ranks[0][name]["steps"]) > 1
