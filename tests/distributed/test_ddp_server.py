"""Two DDP processes that sample from one server: one adapter travels for both, and the run is that of one process."""

from __future__ import annotations

import pytest
import torch
from lora_server import BASE, LoraServer

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_share_a_server_and_train_as_one_process(job, tiny_llama, overlap):
    final, published = {}, {}
    for processes in (2, 1):
        name = f"served-{processes}-{overlap}"
        with LoraServer(tiny_llama) as server:
            given = {"base_url": server.url, "model": BASE, "adapter_folder": f"shelf-{processes}-{overlap}"}
            # Without overlap nothing is stale, and even this job's small updates are seen if one adapter is not there.
            given |= {"overlap": "true"} if overlap else {"max_logp_difference": "1e-3"}
            options = [f"--model.rollout_server.{key}={value}" for key, value in given.items()]
            fit = job.command("fit", processes, "--model.policy.quantization=none", "--name", name, *options)
            job.run([fit], name)
            published[processes] = sum(what == "load" for what, _ in server.log)
        runs = job.folder / "runs" / name
        final[processes] = [torch.load(runs / f"weights-{rank}.pt") for rank in range(processes)]
    # One for each rollout, not one for each rank; the first two are drawn by the same, if the second is drawn ahead.
    assert published[2] == published[1] == (3 if overlap else 4)
    first, second = final[2]
    for key, alone in final[1][0].items():
        assert torch.equal(first[key], second[key])
        assert float((first[key] - alone).abs().max()) <= 1e-6, key
    assert max(float(value.abs().max()) for key, value in first.items() if "lora_B" in key) > 1e-4
